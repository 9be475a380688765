"""Runs the built package as a processor without AVX-512 runs it, on any that has AVX2.

    python -m tests.native.older_processor

Valgrind tells programs that there is no AVX-512, and stops them at its instructions. So it shows
what a newer processor never does: an instruction outside the kernels of the level that was chosen.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

INSIDE = "inside"


def run_layers() -> None:
    """Layers, forward and backward, and quantised ones at each level that is left.

    Forward is held to the definition: the rest runs, and other tests hold it on the processor that
    there is.
    """
    import torch

    from moe_kernels import (
        _C,
        fused_experts,
        fused_experts_quantized,
        quantize_experts,
        topk_router,
    )
    from moe_kernels.reference import fused_experts as definition

    levels = _C.cpu_capabilities()
    if levels == ["default"]:
        print("this processor is older than what valgrind would show")
        return
    if levels != ["default", "avx2"]:
        raise RuntimeError(f"valgrind was to leave the levels default and avx2; got {levels}")
    torch.manual_seed(0)
    tokens, hidden, inner, experts, top_k = 40, 48, 40, 3, 2
    for level in levels:
        _C.set_cpu_capability(level)
        formats = {torch.bfloat16: "int8", torch.float16: "fp8", torch.float32: "int4"}
        for dtype, quantized_as in formats.items():
            x = torch.randn(tokens, hidden, dtype=dtype).requires_grad_()
            gate_up = torch.randn(experts, hidden, 2 * inner, dtype=dtype) / hidden**0.5
            down = (torch.randn(experts, hidden, inner, dtype=dtype) / inner**0.5).mT
            weights = gate_up.requires_grad_(), down.requires_grad_()
            routing = topk_router(torch.randn(tokens, experts), top_k)
            y = fused_experts(x, *weights, routing.topk_ids, routing.topk_weights)
            y.sum().backward()
            wanted = definition(
                *(v.detach().double() for v in (x, *weights)),
                routing.topk_ids,
                routing.topk_weights.double(),
            )
            error = float((y.detach() - wanted).norm() / wanted.norm())
            if not error < 8 * torch.finfo(dtype).eps:
                raise RuntimeError(f"{level}, {dtype}: off by {error} of the definition")
            with torch.inference_mode():
                quantized = [quantize_experts(w.detach(), quantized_as) for w in weights]
                fused_experts_quantized(x, *quantized, routing.topk_ids, routing.topk_weights)


def main(arguments: list[str]) -> int:
    if arguments == [INSIDE]:
        run_layers()
        return 0
    if not shutil.which("valgrind"):
        print("an older processor is valgrind's, which is not on PATH", file=sys.stderr)
        return 2
    command = ["valgrind", "--tool=none", sys.executable, "-m", "tests.native.older_processor"]
    code = subprocess.run([*command, INSIDE]).returncode
    print("the kernels run" if code == 0 else "the kernels do not run", "without AVX-512")
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
