"""UniT (Hu & Singh 2021): encoders -> decoder -> heads, in the order of the paper's Figure 2.

Shape letters: B batch, H W pixels, P image positions, T text tokens, S = P + T memory tokens, E image-encoder width,
C decoder width, L decoder layers, Q queries, K classes, N padded targets of an image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unit_fast.batch import Batch, Output
from unit_fast.batch_checks import checked_task
from unit_fast.config import ModelConfig, RunConfig
from unit_fast.detection import criterion, matcher
from unit_fast.detection.targets import check_targets
from unit_fast.errors import UserError, nearest
from unit_fast.model.backbone import Backbone
from unit_fast.model.folder import Folder
from unit_fast.model.heads import AttributeHead, BoxHead, Classifier
from unit_fast.model.positions import feature_mask, sine_positions
from unit_fast.model.short import Short
from unit_fast.model.text import TextEncoder
from unit_fast.model.transformer import Decoder, DropoutSeeds, ImageEncoder
from unit_fast.tasks import Task, check_indices, get_task, index_limits

TASK_ROWS = 256
"""Rows of the task-embedding tables; only the rows of ``Task.index`` are ever read."""


class UniT(Short, Folder, nn.Module):
    """One transformer for all data sets of ``config.tasks``.

    ``out = model(batch)``; ``query = model.match(out, batch)``; ``sum(model.losses(out, batch, query).values())`` is
    the step loss.
    """

    def __init__(self, config: ModelConfig | RunConfig):
        super().__init__()
        config = config.model if isinstance(config, RunConfig) else config
        self.config = config
        self.tasks: dict[str, Task] = {name: get_task(name) for name in config.tasks}
        encoder, text, width = config.encoder, config.text, config.decoder.width

        # Image encoder (paper 3.1).
        self.backbone = Backbone(config.backbone)
        self.input_proj = nn.Conv2d(config.backbone.out_channels, encoder.width, 1)
        self.image_encoder = ImageEncoder(encoder, TASK_ROWS if encoder.task_embedding else 0)
        equal = encoder.width == width
        self.enc2dec_proj = nn.Identity() if equal else nn.Linear(encoder.width, width)
        self.pos_embed_proj = nn.Identity() if equal else nn.Linear(encoder.width, width)

        # Text encoder (paper 3.2).
        self.text_encoder = TextEncoder(text, TASK_ROWS if text.task_embedding else 0)
        self.bert_projection = nn.Linear(text.width, width)
        self.bert_pos_projection = nn.Linear(text.width, width)

        # Decoder and task queries (paper 3.3).
        if config.decoder.share:
            self.decoder = Decoder(config.decoder)
        else:
            self.decoders = nn.ModuleDict({name: Decoder(config.decoder) for name in config.tasks})
        self.query_embeds = nn.ModuleDict(
            {name: nn.Embedding(task.queries, width) for name, task in config.tasks.items()}
        )

        # Output heads (paper 3.4).
        self.class_embeds, self.bbox_embeds = nn.ModuleDict(), nn.ModuleDict()
        self.attribute_heads, self.classifiers = nn.ModuleDict(), nn.ModuleDict()
        loss = config.loss
        for name, task in config.tasks.items():
            if self.tasks[name].is_detection:
                self.class_embeds[name] = nn.Linear(width, task.outputs)
                self.bbox_embeds[name] = BoxHead(width)
                if self.tasks[name].attributes:
                    self.attribute_heads[name] = AttributeHead(
                        width, task.outputs, loss.attribute_embedding, loss.attribute_hidden, loss.attribute_outputs,
                        loss.attribute_relu,
                    )  # fmt: skip
            else:
                self.classifiers[name] = Classifier(width, task.outputs, config.decoder.classifier_dropout)
        self._init()

    def _init(self) -> None:
        """SPEC 1.11: xavier on every matrix of the image encoder, the projections and a shared decoder."""
        modules = [self.image_encoder.layers, self.enc2dec_proj, self.pos_embed_proj]
        if self.config.decoder.share:
            modules.append(self.decoder)
        elif self.config.decoder.separate_init == "xavier":
            modules.append(self.decoders)
        else:  # the authors' separate decoders: every layer is a copy of the first
            for decoder in self.decoders.values():
                for layer in decoder.layers[1:]:
                    layer.load_state_dict(decoder.layers[0].state_dict())
        for module in modules:
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    # ------------------------------------------------------------------------------------------------- forward

    def forward(self, batch: Batch) -> Output:
        """Hidden states and head outputs for a batch of one task. ``UserError`` on a task or input that is missing."""
        task, name = self._task(batch), batch.task
        seeds = DropoutSeeds(self.training and self._has_dropout(), self.query_embeds[name].weight.device)
        memory, positions, mask = self.encode(batch, seeds)
        hidden = self.decoder_of(name)(self.query_embeds[name].weight, memory, positions, mask, seeds)
        if task.is_detection:
            return self._detect(name, hidden)
        return self._classify(name, hidden, seeds)

    def encode(self, batch: Batch, seeds) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Decoder memory [B,S,C], its positions [B,S,C] and padding mask [B,S]: image tokens first, then text.

        For text alone reduced to ``[CLS]`` the memory is one token and positions and mask are None: the attention to
        a single key does not depend on them.
        """
        task, settings = self.tasks[batch.task], self.config.tasks[batch.task]
        if not task.has_image:
            memory, positions, mask = self.encode_text(batch, seeds)
            if settings.cls_only:
                # The positions stay in the graph with a gradient of exactly zero, as in the authors' model: the
                # policy update_all counts them as used.
                return (memory + 0.0 * positions if torch.is_grad_enabled() else memory), None, None
            return memory, positions, mask
        image = self.encode_image(batch, seeds)
        if not task.has_text:
            return image
        text = self.encode_text(batch, seeds)
        memory, positions, mask = (torch.cat(parts, dim=1) for parts in zip(image, text))
        return memory, positions, mask

    def encode_image(self, batch: Batch, seeds) -> tuple[Tensor, Tensor, Tensor]:
        """Image memory and positions [B,P,C] and mask [B,P] (SPEC 1.3 to 1.5)."""
        features = self.input_proj(self.backbone(batch.image))
        height, width = features.shape[-2:]
        if batch.pixel_mask is None:
            mask_Bhw = torch.zeros(features.shape[0], height, width, dtype=torch.bool, device=features.device)
        else:
            mask_Bhw = feature_mask(batch.pixel_mask, height, width)
        mask_BP = mask_Bhw.flatten(1)
        sine = sine_positions(mask_Bhw, self.config.encoder.width).to(features.dtype)
        x = features.flatten(2).transpose(1, 2)
        memory = self.image_encoder(x, sine, mask_BP, self.tasks[batch.task].index, seeds)
        if self.config.encoder.residual:
            memory = memory + x
        return self.enc2dec_proj(memory), self.pos_embed_proj(sine), mask_BP

    def encode_text(self, batch: Batch, seeds) -> tuple[Tensor, Tensor, Tensor]:
        """Text memory and positions [B,T,C] and mask [B,T]; T = 1 where only ``[CLS]`` is used (SPEC 1.6)."""
        cls_only = self.config.tasks[batch.task].cls_only
        tokens = self.text_encoder(
            batch.input_ids, batch.attention_mask, batch.token_type_ids, self.tasks[batch.task].index, seeds, cls_only
        )
        length = tokens.shape[1]
        # The positions are the raw rows of BERT's own table: a second gradient path into it.
        positions = self.bert_pos_projection(self.text_encoder.position_embeddings.weight[:length])
        memory = self.bert_projection(tokens)
        return memory, positions.expand(memory.shape[0], -1, -1), (batch.attention_mask != 1)[:, :length]

    def _detect(self, name: str, hidden_LBQC: Tensor) -> Output:
        logits, boxes = self.class_embeds[name](hidden_LBQC), self.bbox_embeds[name](hidden_LBQC)
        out = Output(hidden_states=hidden_LBQC, logits=logits, boxes=boxes)
        if name in self.attribute_heads and not self.training:
            out.attribute_logits = self.predict_attributes(name, hidden_LBQC, logits)
        return out

    def predict_attributes(self, name: str, hidden_LBQC: Tensor, logits_LBQK: Tensor) -> Tensor:
        """Attribute logits [B,Q,attributes] of the last layer, given each query's most likely real class."""
        return self.attribute_heads[name](hidden_LBQC[-1], logits_LBQK[-1, ..., :-1].argmax(-1))

    def _classify(self, name: str, hidden_LBQC: Tensor, seeds) -> Output:
        classifier = self.classifiers[name]
        if self.config.loss.on_all_hidden_states:
            scores = classifier(hidden_LBQC[:, :, 0], seeds)
            return Output(hidden_states=hidden_LBQC, scores=scores[-1], layer_scores=scores)
        return Output(hidden_states=hidden_LBQC, scores=classifier(hidden_LBQC[-1, :, 0], seeds))

    # -------------------------------------------------------------------------------------------------- losses

    def match(self, out: Output, batch: Batch) -> Tensor:
        """Query of every target, int64 [L,B,N]; -1 for padding and for targets that got none."""
        if out.logits is None:
            raise UserError(f"match: {batch.task} has no boxes to match; its losses need no matching")
        layers = slice(None) if self.config.loss.auxiliary else slice(-1, None)
        return matcher.match(out.logits[layers], out.boxes[layers], batch, self.config.loss)

    def shares(self, batches: Sequence[Batch]) -> list[criterion.Share | None]:
        """For ``losses``: what each of the batches of one update and task is of the whole. None where a loss is a mean
        over samples, whose parts add up by their sizes alone."""
        name = batches[0].task
        if not self.tasks[name].is_detection:
            return [None] * len(batches)
        return criterion.shares(batches, self.config.tasks[name].queries, self.config.loss)

    def losses(
        self,
        out: Output,
        batch: Batch,
        matching: Tensor | None = None,
        split: str = "train",
        share: criterion.Share | None = None,
    ) -> dict:
        """Weighted loss terms, named ``{split}/{dataset}/{term}`` as in SPEC 2.1; their sum is the step loss.

        ``share``: the batch is one of several that are accumulated; the step loss is then the sum of theirs, each times
        its samples by those of all.
        """
        name, loss = batch.task, self.config.loss
        if name not in self.tasks:
            raise UserError(f"losses: the model has no task {name!r}; {nearest(name, self.tasks)}")
        check_indices(f"losses of {name}", batch.largest or {}, index_limits(self.tasks[name], self.config))
        if self.tasks[name].is_detection:
            matching = self.match(out, batch) if matching is None else matching
            terms = criterion.detection_losses(
                out.logits, out.boxes, out.hidden_states, matching, batch, loss,
                attribute_head=self.attribute_heads[name] if name in self.attribute_heads else None,
                no_object=self.config.tasks[name].outputs - 1, share=share,
            )  # fmt: skip
        else:
            scores = out.scores[None] if out.layer_scores is None else out.layer_scores
            terms = {f"loss_{i}": self._classification_loss(name, s, batch) for i, s in enumerate(scores)}
        return {f"{split}/{name}/{key}": value for key, value in terms.items()}

    def _classification_loss(self, name: str, scores_BK: Tensor, batch: Batch) -> Tensor:
        check_targets("losses", batch, "answer_scores" if self.tasks[name].loss == "bce" else "label")
        if self.tasks[name].loss == "bce":
            return criterion.vqa_loss(scores_BK, batch.answer_scores)
        return criterion.class_loss(scores_BK, batch.label)

    # ---------------------------------------------------------------------------------------- parameters by use

    def decoder_of(self, name: str) -> Decoder:
        return self.decoder if self.config.decoder.share else self.decoders[name]

    def parameter_groups(self, lr: float, lr_backbone: float) -> list[dict]:
        """Trainable parameters as optimiser groups ``main`` and ``backbone`` (SPEC 3.2); lr_backbone 0 leaves the
        backbone out."""
        main = [p for n, p in self.named_parameters() if p.requires_grad and not n.startswith("backbone.")]
        groups = [{"name": "main", "params": main, "lr": lr}]
        backbone = [p for p in self.backbone.parameters() if p.requires_grad]
        if backbone and lr_backbone > 0.0:
            groups.append({"name": "backbone", "params": backbone, "lr": lr_backbone})
        return groups

    def used_parameters(self, name: str) -> dict[str, bool]:
        """Parameter name -> whether a training step on data set ``name`` uses it (SPEC 3.4, 3.5).

        ``bert_pos_projection`` counts as used on GLUE, with a gradient of exactly zero.
        """
        task = get_task(name)
        name = task.name
        prefixes = ["decoder." if self.config.decoder.share else f"decoders.{name}."]
        prefixes += [f"{m}.{name}." for m in ("query_embeds", "class_embeds", "bbox_embeds", "classifiers")]
        prefixes.append(f"attribute_heads.{name}.")
        if task.has_image:
            prefixes += ["backbone.", "input_proj.", "image_encoder.", "enc2dec_proj.", "pos_embed_proj."]
        if task.has_text:
            prefixes += ["text_encoder.", "bert_projection.", "bert_pos_projection."]
        prefixes = tuple(prefixes)
        return {
            n: p.requires_grad and n.startswith(prefixes) and not n.startswith("text_encoder.pooler.")
            for n, p in self.named_parameters()
        }

    # -------------------------------------------------------------------------------------------------- helpers

    def _has_dropout(self) -> bool:
        encoder, text, decoder = self.config.encoder, self.config.text, self.config.decoder
        return any((encoder.dropout, text.dropout, decoder.dropout, decoder.classifier_dropout))

    def _task(self, batch: Batch) -> Task:
        task = checked_task(batch, self.tasks)
        pieces = {k: v for k, v in (batch.largest or {}).items() if k == "input_ids"}
        check_indices(batch.task, pieces, index_limits(task, self.config))
        return task
