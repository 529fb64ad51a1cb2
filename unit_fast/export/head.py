"""One task of a model as a module of plain tensors, which exporters take."""

from torch import Tensor, nn

from unit_fast.batch import Batch
from unit_fast.model import UniT
from unit_fast.tasks import get_task

IMAGE = {
    "image": "float32 [batch,3,height,width], RGB, normalised, zeros at the bottom and right of smaller images",
    "pixel_mask": "bool [batch,height,width], true where the image is padding",
}
TEXT = {
    "input_ids": "int64 [batch,tokens], word pieces, 0 on padding",
    "attention_mask": "int64 [batch,tokens], 1 on real tokens, 0 on padding",
    "token_type_ids": "int64 [batch,tokens], 0 in the first text, 1 in the second",
}
DETECTION = {
    "logits": "float32 [batch,queries,classes], softmax gives probabilities, the last class is no object",
    "boxes": "float32 [batch,queries,4], centre x, centre y, width, height, relative to the image without padding",
}
ATTRIBUTES = {"attribute_logits": "float32 [batch,queries,attributes], of each query's most likely class"}
SCORES = {
    "bce": {"scores": "float32 [batch,answers], sigmoid gives the score of each answer"},
    "ce": {"scores": "float32 [batch,classes], softmax gives probabilities"},
}


class TaskHead(nn.Module):
    """``model`` in evaluation mode for one task: tensors in the order of ``inputs``, results in that of ``outputs``.

    Takes ``model`` over: parts that the task does not use are taken out of it, and of detection only the last decoder
    layer is told.
    """

    def __init__(self, model: UniT, name: str):
        super().__init__()
        task = get_task(name)
        self.name = task.name
        self.inputs = {**(IMAGE if task.has_image else {}), **(TEXT if task.has_text else {})}
        self.outputs = {**DETECTION, **(ATTRIBUTES if task.attributes else {})}
        if not task.is_detection:
            self.outputs = SCORES[task.loss]
        for module in model.children():
            if isinstance(module, nn.ModuleDict):
                for other in set(module) - {task.name}:
                    del module[other]
        unused = () if task.has_image else ("backbone", "input_proj", "image_encoder", "enc2dec_proj", "pos_embed_proj")
        unused += () if task.has_text else ("text_encoder", "bert_projection", "bert_pos_projection")
        for part in unused:
            setattr(model, part, nn.Identity())
        self.model = model.eval().requires_grad_(False)
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        out = self.model(Batch(task=self.name, **dict(zip(self.inputs, tensors))))
        if out.logits is None:
            return (out.scores,)
        found = (out.logits[-1], out.boxes[-1])
        return found if out.attribute_logits is None else (*found, out.attribute_logits)
