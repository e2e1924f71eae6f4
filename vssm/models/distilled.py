"""Two classifiers on the same features: one learns from the labels, the other from a teacher (arXiv 2012.12877).

timm's convention for distilled models, as its `deit` and `levit_distilled` have it.

Letters: B batch.
"""

from torch import Tensor, nn


class DistilledHeads:
    """Mixin for a `Pyramid`, before it among the bases: `head.fc` learns from labels, `head_dist` from a teacher.

    In evaluation, and in training until `set_distilled_training(True)`, logits are the mean of both classifiers. Names
    for `default_cfgs`: `classifier=DISTILLED_CLASSIFIERS`.
    """

    distilled_training = False

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training mode, give out the logits of both classifiers, (labels', teacher's), instead of their mean."""
        self.distilled_training = enable

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """Both final linear layers, the labels' first; nn.Identity() twice if there are none."""
        return self.head.fc, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Two new classifiers of `num_classes` outputs (0: none); `global_pool` as in timm, None keeps the present."""
        super().reset_classifier(num_classes, global_pool)
        second = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        self.head_dist = second.to(next(self.stem.parameters())).train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Map of `forward_features` -> logits, or with `pre_logits` what both classifiers would get."""
        x = super().forward_head(x, pre_logits=True)
        return x if pre_logits else self.classify(x)

    def classify(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Pooled features (B, head_hidden_size) -> logits (B, num_classes), a pair of them in distilled training."""
        labels, teacher = self.head.fc(x), self.head_dist(x)
        if self.training and self.distilled_training:
            return labels, teacher
        return (labels + teacher) / 2


DISTILLED_CLASSIFIERS = ("head.fc", "head_dist")
