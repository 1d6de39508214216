"""Settings of where and how a run computes, and of generation. Defaults are those of the published runs."""

import math
from dataclasses import dataclass

from ..method.fields import Allowed, at_least, check_settings, setting

SEED = Allowed("0 to 2^63 - 1", lambda value: 0 <= value < 2**63)  # what torch's generators take
THREADS = Allowed("auto, or 1 to 1024", {"auto", *map(str, range(1, 1025))}.__contains__)


@dataclass(frozen=True)
class Sampling:
    """How text is generated."""

    max_new_tokens: int = setting(100, "at most", at_least(1))
    temperature: float = setting(
        0.8, "0 is greedy", Allowed("0 or more", lambda value: 0 <= value < math.inf)
    )
    top_k: int = setting(50, "only so many most likely tokens are drawn from", at_least(1))
    seed: int = setting(0, "of the sampling", SEED)

    def __post_init__(self) -> None:
        check_settings(self, "sampling")


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how it runs."""

    seed: int = setting(42, "of everything random", SEED)
    device: str = setting(
        "auto",
        "where it computes",
        {"auto": "cuda, else mps, else cpu", "cpu": "", "cuda": "an NVIDIA GPU", "mps": "an Apple GPU"},
    )
    precision: str = setting(
        "auto",
        "of Phase 2's matrix products",
        {"auto": "bf16 where the processor or GPU has units for it", "fp32": "", "bf16": ""},
    )
    threads: str = setting("auto", "of a CPU; auto: as many as torch takes by itself", THREADS)
    embedding_cache: str = setting(
        "gather",
        "how the tokens of a stream are held",
        {"gather": "token ids and one table", "dense": "one row a position, as published"},
    )

    def __post_init__(self) -> None:
        check_settings(self, "runtime")
