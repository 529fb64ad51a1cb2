"""A trained model as a file for other programs: ONNX or a ``torch.export`` archive of one task."""
