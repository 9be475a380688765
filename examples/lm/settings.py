"""What determines a run step by step. Every checkpoint holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Model, data order and optimizer.

    Nothing here depends on how long the run lasts or on how many ranks it has, so that a run may be
    continued with other values of both.

    Attributes:
        batch: sequences a step, over all ranks together.
        length: bytes a sequence.
        lr, warmup: the rate rises linearly for ``warmup`` steps, then falls as 1 / sqrt(step).
        clip: largest norm of the gradient.
        balance: weight of the load-balancing loss.
        hidden, layers, heads, experts, top_k, inner: of the model; inner is an expert's width.
        text: SHA-256 of the text.
    """

    seed: int = 0
    batch: int = 16
    length: int = 256
    lr: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    balance: float = 0.01
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 16
    top_k: int = 2
    inner: int = 128
    text: str = ""

    def check(self) -> None:
        """Raise ValueError unless the values make sense together."""
        for field in fields(self):
            value, option = getattr(self, field.name), "--" + field.name.replace("_", "-")
            least = 0 if field.name in ("seed", "weight_decay", "balance") else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{option} must be at least {least}; got {value}")
            if isinstance(value, float) and not 0 <= value < float("inf"):
                raise ValueError(f"{option} must be finite and not negative; got {value}")
        if self.seed >= 2**63:
            raise ValueError(f"--seed must be below 2**63; got {self.seed}")
        if self.clip == 0:
            raise ValueError("--clip must be positive, or nothing is learnt; got 0.0")
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"--hidden must be a multiple of 2 * heads = {2 * self.heads}; got {self.hidden}"
            )
        if self.top_k > self.experts:
            raise ValueError(f"--top-k must be at most experts = {self.experts}; got {self.top_k}")

    def check_layout(self, ep: int | None, cp: int, pp: int, accumulate: int) -> None:
        """Raise ValueError unless experts, sequences, layers and batch can be cut up like this."""
        for name, value in {"ep": ep, "cp": cp, "pp": pp, "accumulate": accumulate}.items():
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1; got {value}")
        if ep is not None and self.experts % ep:
            raise ValueError(f"--ep must divide experts = {self.experts}; got {ep}")
        if cp > 1 and self.length % (2 * cp):
            raise ValueError(f"--length must be a multiple of 2 * cp = {2 * cp}; got {self.length}")
        if pp > self.layers:
            raise ValueError(f"--pp must be at most layers = {self.layers}; got {pp}")

    def check_batch(self, data_ranks: int, stages: int, accumulate: int) -> None:
        """Raise ValueError unless each of the ranks that share the batch gets some of each part."""
        parts = data_ranks * accumulate
        if self.batch < parts:
            raise ValueError(
                f"--batch must be at least the parts of ranks that share it, {data_ranks} ranks * "
                f"accumulate {accumulate} = {parts}; got {self.batch}"
            )
        if stages > 1 and self.batch % (parts * stages):
            raise ValueError(
                f"--batch must be a multiple of {data_ranks} ranks * accumulate {accumulate} * pp "
                f"{stages} = {parts * stages} with --pp; got {self.batch}"
            )

    def learning_rate(self, step: int) -> float:
        """Of the step that follows ``step`` earlier ones."""
        done = (step + 1) / self.warmup
        return self.lr * min(done, done**-0.5)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
