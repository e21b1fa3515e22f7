"""Estimate what a merge and a sweep cost at sizes and on machines that were not at hand: the tables of docs/scale.md.

    python benchmarks/scale.py

Nothing is run here. The constants come from benchmarks/cost.py on two CPU cores. The machines' rates are assumptions;
docs/scale.md has them.
"""

from dataclasses import dataclass

from mergekit_fim.fisher.loading import RESERVE, RESERVED_PART
from mergekit_fim.tools.explain import PRE_PASS_MEMORY, PROGRAM_MEMORY, activation_memory

GB = 1e9
SEQUENCES, LENGTH, WIDTH = 8, 64, 2  # the default settings, in bfloat16

# The pre-pass takes this many times as long as its arithmetic: 1.3 to 1.4 at 1.5B, 1.6 at 7B, which waits for its disk.
OVER_ARITHMETIC = 1.4
# Seconds of a CPU core that fim_ties takes per GB of each model, without reading and writing:
# (35.3 − 19.6) s × 2 cores / 3.1 GB at 1.5B, (135.2 − 83.3) s × 2 cores / 15.2 GB at 7B.
MERGE_CORE_SECONDS = 8.0


@dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    hidden: int
    intermediate: int
    kv: int
    vocab: int

    @property
    def layer(self) -> int:
        """Return the parameters of a decoder layer, without norms and biases."""
        return self.hidden * (2 * self.hidden + 2 * self.kv + 3 * self.intermediate)

    @property
    def size(self) -> float:
        """Return the bytes of the model, untied."""
        return WIDTH * (self.layers * self.layer + 2 * self.vocab * self.hidden)

    @property
    def operations(self) -> float:
        """Return the pre-pass's: forward, recomputed, and backward to activations. The head isn't recomputed."""
        return SEQUENCES * LENGTH * (6 * self.layers * self.layer + 4 * self.vocab * self.hidden)


SHAPES = [
    Shape("7B", 28, 3584, 18944, 512, 152064),
    Shape("70B", 80, 8192, 28672, 1024, 128256),
    Shape("405B", 126, 16384, 53248, 1024, 128256),
]


@dataclass(frozen=True)
class Machine:
    """Rates in operations or bytes per second; `gpu` is the memory of one GPU, and `memory` how fast it reads that."""

    name: str
    gpus: int
    gpu: float
    rate: float
    cores: int
    disk: float
    bus: float
    memory: float


SMALL_GPU = Machine("one 24 GB GPU, 16 cores", 1, 24 * GB, 70e12, 16, 3 * GB, 20 * GB, 900 * GB)
LARGE_GPU = Machine("one 80 GB GPU, 16 cores", 1, 80 * GB, 350e12, 16, 3 * GB, 40 * GB, 2000 * GB)
MACHINES = [SMALL_GPU, Machine("eight 80 GB GPUs, 64 cores", 8, 80 * GB, 350e12, 64, 5 * GB, 40 * GB, 2000 * GB)]

# The machine of what was run. At its rate of arithmetic the pair of 1.5B would take 10.8 s. At its rate of the disk the
# pair of 7B was read. MEASURED has seconds of the pre-pass and of the merge after it, imports included.
SMALL = Shape("1.5B", 28, 1536, 8960, 256, 151936)
AS_MEASURED = Machine("two cores, 24 GB, no GPU", 0, 0, SMALL.operations / 10.8, 2, 1.6 * GB, 0, 0)
MEASURED = {"7B": (83.3, 135.2 - 83.3)}


@dataclass(frozen=True)
class Estimate:
    pre_pass: float
    merge: float
    memory: float
    gpu_memory: float


def estimate(shape: Shape, machine: Machine) -> Estimate:
    """Return seconds and bytes of a merge of a base and one fine-tuned model by `fim_ties`. The file cache is empty.

    - The base is read once where it stays on the accelerators. Else it is read twice, for forward and backward pass.
    - The fine-tuned model is read once.
    - What is read goes over the bus: of one GPU where weights are streamed, else of all GPUs at once.
    - GPUs that hold the model together work in turn.
    - Merging is on the CPU.
    """
    activations = activation_memory(shape.layers, shape.hidden, shape.intermediate, SEQUENCES * LENGTH, WIDTH)
    room = max(0.0, (machine.gpu - RESERVE) / (1 + RESERVED_PART))
    resident = shape.size <= machine.gpus * room
    reads = shape.size * ((1 if resident else 2) + 1)
    arithmetic = OVER_ARITHMETIC * shape.operations / machine.rate
    moved = reads / machine.bus / (machine.gpus if resident else 1) if machine.gpus else 0.0
    merge = 2 * shape.size / machine.disk + shape.size / machine.disk
    merge += MERGE_CORE_SECONDS * shape.size / GB / machine.cores
    on_gpu = activations + PRE_PASS_MEMORY / 2
    on_gpu += shape.size / max(1, machine.gpus) if resident else WIDTH * shape.layer
    return Estimate(
        reads / machine.disk + moved + arithmetic,
        merge,
        max(PRE_PASS_MEMORY + activations, PROGRAM_MEMORY + 5 * GB + WIDTH * shape.vocab * shape.hidden),
        on_gpu if machine.gpus else 0.0,
    )


def table() -> str:
    lines = ["| model | machine | pre-pass | merge | memory | on each GPU | run? |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        machines = [AS_MEASURED, *MACHINES] if shape.name in MEASURED else MACHINES
        for machine in machines:
            found = estimate(shape, machine)
            gpu = f"{found.gpu_memory / GB:.0f} GB" if machine.gpus else ""
            run = "**not run**"
            if machine is AS_MEASURED:
                run = "measured: {}, {}".format(*map(_time, MEASURED[shape.name]))
            lines.append(
                f"| {shape.name}, {shape.size / GB:.0f} GB | {machine.name} | {_time(found.pre_pass)} | "
                f"{_time(found.merge)} | {found.memory / GB:.0f} GB | {gpu} | {run} |"
            )
    return "\n".join(lines)


@dataclass(frozen=True)
class Sweep:
    """What a sweep asks: so many merges, the base and the long model, with so many tokens in the mean answer."""

    merges: int
    problems: int
    tokens: int


# docs/reproduce.md begins with it: two methods of six strengths on MATH500. The tokens are an assumption.
SWEEP = Sweep(12, 500, 3000)
ROOM = 0.9  # the part of a GPU's memory that vLLM takes


def sweep(shape: Shape, machine: Machine, asked: Sweep = SWEEP) -> tuple[float, float]:
    """Return the seconds of a sweep's merges and of its answers, on one GPU that does nothing else.

    - Each merge is one of `estimate`. The measurement is made once, which is left out of account.
    - Answers are written side by side, as many as fit beside the weights at their full length.
    - A step writes a token of each. It reads the weights and all keys and values, which are half of the full length in
      the mean. It takes the longer of reading and arithmetic.
    """
    cached = WIDTH * 2 * shape.layers * shape.kv
    rows = min(asked.problems, (ROOM * machine.gpu - shape.size) // (asked.tokens * cached))
    reads = shape.size + rows * asked.tokens / 2 * cached
    step = max(reads / machine.memory, rows * shape.size / WIDTH * 2 / machine.rate)
    its = estimate(shape, machine)
    merges = asked.merges * (its.pre_pass + its.merge)
    return merges, (asked.merges + 2) * asked.problems * asked.tokens / rows * step


def sweep_table() -> str:
    lines = ["| model | machine | merges | answers | run? |", "| --- | --- | --- | --- | --- |"]
    for shape in (SMALL, SHAPES[0]):
        for machine in (SMALL_GPU, LARGE_GPU):
            cells = " | ".join(map(_time, sweep(shape, machine)))
            lines.append(f"| {shape.name} | {machine.name} | {cells} | **not run** |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    print(table(), sweep_table(), sep="\n\n")
