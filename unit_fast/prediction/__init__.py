"""What a trained model says about an image and/or a text: ``load(run).predict(task, image=..., text=...)``."""
