"""The Triton kernels' machine code, made without a GPU: registers, spills, shared memory, instructions.

    python kernels/benchmarks/bench_compile.py [--out FILE] [--quick]

Compiles what the launchers would launch on a GPU for which nothing was measured, for the layers of Llama-2-7B,
Llama-3-8B and Llama-3-70B, r=8 E=4 and r=16 E=8 (for one layer also r=64 E=8, whose K takes several blocks, other
dtypes, with a routing probe, and on sm_90 with programmatic dependent launch; for one with many partial sums also
r=64 E=8 and r=16 E=4), decode and prefill, on sm_80 and sm_90.
Layers whose launches are the same code are one entry. Exits with 1 when any kernel spills. What Triton has compiled
before comes from its cache, so that a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import provenance
import torch
import triton
from hydra_kernels.tuning.config import default_expand, default_shrink, power_of_two
from hydra_kernels.tuning.machine_code import Launch, MachineCode, Specialisation, compile_launch, linear_launches
from hydra_kernels.tuning.shapes import ADAPTERS, MODELS, LayerShape, capacity
from hydra_kernels.weights import Layout

CAPABILITIES = (80, 90)
TOKENS = (1, 8, 64, 128, 256, 2048, 8192)
WIDE = Layout(64, 8, has_router=True)
RESULTS = Path(__file__).parent / "results"

# Registers and shared memory (bytes) of a multiprocessor, threads it can hold.
LIMITS = {80: (65536, 167936, 2048), 90: (65536, 233472, 2048)}


@dataclass(frozen=True)
class Case:
    """A launch pair to compile."""

    name: str
    layer: LayerShape
    layout: Layout
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    probe: bool = False
    pdl: bool = False

    def launches(self) -> tuple[Launch, ...]:
        """Shrink, expand, and the sum of partial sums."""
        size, config = capacity(self.layout), None
        if self.pdl:
            tokens, in_features, itemsize = power_of_two(self.tokens), self.layer.in_features, self.dtype.itemsize
            shrink = default_shrink(tokens, in_features, size.rows, len(self.layer.out_slices), itemsize)
            default = default_expand(tokens, self.layer.out, size.k, itemsize, shrink.splits(in_features))
            config = replace(default, pdl=True)
        return linear_launches(self.layer, size, self.tokens, self.dtype, expand_config=config, probe=self.probe)


def cases(quick: bool) -> Iterator[Case]:
    """All of them; for `quick` a few of each kind."""
    for model, layers in MODELS.items():
        for layer in layers[:1] if quick else layers:
            for adapter, layout in ADAPTERS.items():
                for tokens in (8, 8192) if quick else TOKENS:
                    yield Case(f"{model} {layer.name} {adapter} T={tokens}", layer, layout, tokens)
    layer = MODELS["llama-3-8b"][0]
    for tokens in (8, 2048):
        name = f"llama-3-8b qkv r16-e8 T={tokens}"
        for dtype in (torch.float16, torch.float32):
            yield Case(f"{name} {str(dtype)[6:]}", layer, ADAPTERS["r16-e8"], tokens, dtype)
        yield Case(f"{name} with a routing probe", layer, ADAPTERS["r16-e8"], tokens, probe=True)
        yield Case(f"{name} with dependent launch", layer, ADAPTERS["r16-e8"], tokens, pdl=True)
        yield Case(f"llama-3-8b qkv r64-e8 T={tokens}", layer, WIDE, tokens)
    down = MODELS["llama-3-8b"][3]
    for adapter, layout in {"r16-e4": Layout(16, 4, has_router=True), "r64-e8": WIDE}.items():
        yield Case(f"llama-3-8b down {adapter} T=128", down, layout, 128)


def distinct(quick: bool) -> dict[tuple[str, ...], tuple[Launch, list[str]]]:
    """The launches that are different code, each with the cases that it serves."""
    found: dict[tuple[str, ...], tuple[Launch, list[str]]] = {}
    for case in cases(quick):
        for launch in case.launches():
            key = (launch.kernel.__name__, str(Specialisation.of(launch)), str(launch.options))
            found.setdefault(key, (launch, []))[1].append(case.name)
    return found


def programs_at_once(code: MachineCode, launch: Launch, capability: int) -> int:
    """How many programs share a multiprocessor, by registers, shared memory and threads."""
    registers, shared, threads = LIMITS[capability]
    size: int = 32 * launch.options["num_warps"]
    by_registers: int = registers // (-(-code.registers // 8) * 8 * size)
    return min(by_registers, shared // (code.shared_bytes + 1024), threads // size)


def entry(launch: Launch, names: list[str], capability: int) -> dict[str, object]:
    """One line of the result."""
    code = compile_launch(launch, capability)
    special = Specialisation.of(launch)
    return {
        "kernel": launch.kernel.__name__.strip("_"),
        "capability": capability,
        "dtype": next(special.signature[name] for name in ("a_ptr", "b_ptr", "z_ptr") if name in special.signature)[1:],
        **asdict(code),
        "programs_at_once": programs_at_once(code, launch, capability),
        "options": dict(launch.options),
        "constants": {name: value for name, value in special.constants.items() if isinstance(value, int)},
        "serves": names,
    }


def print_table(entries: list[dict[str, object]]) -> None:
    """The largest needs of each kernel, capability and dtype."""
    print(f"\n{'kernel':14} {'sm':>3} {'dtype':5} {'codes':>5} {'registers':>9} {'spills':>6} {'shared KiB':>10}")
    for key in sorted({(str(e["kernel"]), int(str(e["capability"])), str(e["dtype"])) for e in entries}):
        same = [e for e in entries if (e["kernel"], e["capability"], e["dtype"]) == key]
        most = [max(int(str(e[name])) for e in same) for name in ("registers", "spills", "shared_bytes")]
        print(f"{key[0]:14} {key[1]:3} {key[2]:5} {len(same):5} {most[0]:9} {most[1]:6} {most[2] / 1024:10.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / f"compile_triton_{triton.__version__}.json")
    parser.add_argument("--quick", action="store_true", help="one layer of each model, to see that it runs")
    options = parser.parse_args()
    entries = []
    found = distinct(options.quick)
    for i, (launch, names) in enumerate(found.values()):
        least = 90 if launch.arguments.get("PDL") else 80
        entries += [entry(launch, names, capability) for capability in CAPABILITIES if capability >= least]
        print(f"{i + 1} of {len(found)}: {names[0]} {launch.kernel.__name__}", flush=True)
    lines = ",\n  ".join(json.dumps(e) for e in entries)
    header = json.dumps({"commit": provenance.commit(), "versions": provenance.versions()})[:-1]
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(f'{header},\n "entries": [\n  {lines}\n ]}}\n')
    print_table(entries)
    spilling = [e["serves"] for e in entries if e["spills"] or e["stack_bytes"]]
    print(f"wrote {options.out}; {len(spilling)} of {len(entries)} kernels spill: {spilling}")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
