"""The arithmetic of scale: what a training run computes, holds, lasts and costs."""

from dataclasses import dataclass

from support.gpt import GPTConfig

# Dense matrix products in bfloat16 a second, and bytes of memory: NVIDIA's data sheets.
GPUS = {"A100": (312e12, 80e9), "H100": (989e12, 80e9), "RTX 4090": (165e12, 24e9)}


def training_flops(n_parameters: float, n_tokens: float) -> float:
    """Return about how many operations training takes. Kaplan et al., 2020, section 2.1."""
    return 6 * n_parameters * n_tokens


def flops_per_token(config: GPTConfig) -> int:
    """Return how many operations in matrix products a token costs in training: exactly.

    Chowdhery et al., PaLM, 2022, appendix B; with T for every token, as if none were masked.
    """
    C, T, layers = config.d_model, config.context_length, config.n_layers
    in_matrices = 12 * C * C * layers + config.vocab_size * C  # the blocks and the head
    attention = 2 * layers * T * C  # queries times keys, and weights times values
    return 6 * (in_matrices + attention)


def state_bytes(n_parameters: float, n_gpus: int = 1, stage: int = 0) -> dict[str, float]:
    """Return the bytes of training's state on each GPU, in mixed precision with AdamW.

    Weights and gradients take 2 bytes each; a copy of the weights and the two averages, 4 each.
    Stage 1 shares out the last three, 2 the gradients too, 3 the weights too.
    Rajbhandari et al., ZeRO, 2020, sections 3.1 and 5.
    """
    if stage not in range(4) or n_gpus < 1:
        raise ValueError(f"stage={stage} must be 0 to 3, and n_gpus={n_gpus} at least 1.")
    whole = {"weights": 2 * n_parameters, "gradients": 2 * n_parameters, "AdamW": 12 * n_parameters}
    first_shared = {"weights": 3, "gradients": 2, "AdamW": 1}
    return {name: n / n_gpus if stage >= first_shared[name] else n for name, n in whole.items()}


def activation_bytes(d_model: int, n_layers: int, n_tokens: int) -> float:
    """Return the bytes that the blocks keep for the backward pass, at 2 bytes a number.

    Korthikanti et al., Reducing Activation Recomputation, 2022, section 4.1, without the part that
    FlashAttention does not keep.
    """
    return 34 * d_model * n_layers * n_tokens


def usual_shape(n_parameters: float) -> tuple[int, int]:
    """Return (width, layers) of a GPT of usual proportions: a width of 128 for each layer.

    A block has 12 width² parameters, so n = 12 · 128² · layers³.
    """
    layers = max(1, round((n_parameters / (12 * 128**2)) ** (1 / 3)))
    return 128 * layers, layers


@dataclass
class Plan:
    """What a training run takes: operations, days, dollars, and bytes on each GPU by part."""

    flops: float
    days: float
    dollars: float
    whole: dict[str, float]
    sharded: dict[str, float]
    memory: float

    def fits(self) -> dict[str, bool]:
        """Return whether a GPU has the memory, for each way."""
        ways = {"whole": self.whole, "sharded": self.sharded}
        return {name: sum(parts.values()) <= self.memory for name, parts in ways.items()}


def plan(
    n_parameters: float,
    n_tokens: float,
    n_gpus: int,
    mfu: float = 0.4,
    gpu: str = "H100",
    dollars_per_hour: float = 2.0,
    tokens_at_once: int = 4096,
) -> Plan:
    """Return what it takes to train a GPT of usual proportions.

    Args:
        mfu: model FLOPs utilization, the share of the GPU's peak that is reached, 0 to 1.
        dollars_per_hour: of one GPU.
        tokens_at_once: in one micro batch of one GPU.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu={mfu} must be above 0 and at most 1.")
    peak, memory = GPUS[gpu]
    flops = training_flops(n_parameters, n_tokens)
    hours = flops / (n_gpus * peak * mfu) / 3600
    kept = {"activations": activation_bytes(*usual_shape(n_parameters), tokens_at_once)}
    return Plan(
        flops=flops,
        days=hours / 24,
        dollars=hours * n_gpus * dollars_per_hour,
        whole=state_bytes(n_parameters) | kept,
        sharded=state_bytes(n_parameters, n_gpus, stage=3) | kept,
        memory=memory,
    )
