"""The package's grouped GEMM where warps have roles: what a table may ask for, and none does yet.

Such kernels may be wrong, or never end, by a mistake of the compiler; so they run only if named.
"""

from __future__ import annotations

from benchmarks.registry import Builder, Case, Implementation, Inputs, Output, Provider, Unsupported

# rows, columns and contracted elements of a tile, warps, stages, and who gives the roles
CUTS = {
    "triton": (128, 256, 64, 4, 3, "triton"),
    "gluon_turns": (128, 128, 64, 8, 6, "gluon"),
    "gluon_shared": (128, 256, 64, 8, 4, "gluon"),
}


def _no_backward(outputs: Output, inputs: Inputs) -> None:
    raise Unsupported("is measured forward only")


def _grouped_gemm(name: str) -> Builder:
    def build(case: Case) -> Implementation:
        from moe_kernels.triton import _operands
        from moe_kernels.triton._config_tables import Config
        from moe_kernels.triton._launch import on_device_of
        from moe_kernels.triton._tiles import build_tile_map
        from moe_kernels.triton.grouped_gemm import multiply_rows

        m, n, k, warps, stages, by = CUTS[name]
        cut = Config(m, n, k, warps=warps, stages=stages, warp_specialize=by)
        b, first = case.weights["w"].detach().mT, case.inputs[0]["a"].detach()
        rows = _operands.row_operand(first, None, m, k)
        weight = _operands.weight_operand(b, k, n)
        if not (
            _operands.specializes("grouped_gemm", cut, weight, rows)
            or _operands.has_hopper_gemm(cut, weight, rows, first)
        ):
            raise Unsupported("cannot give warps roles on this device, or for this layout or dtype")

        def run(inputs: Inputs) -> Output:
            a = inputs["a"].detach()
            out = a.new_empty(a.shape[0], b.shape[2])
            with on_device_of(a):
                multiply_rows(a, b, None, out, build_tile_map(inputs["offsets"], len(a), m), cut)
            return out

        return Implementation(run, _no_backward)

    return build


roles = tuple(
    Provider(
        f"moe_kernels_roles_{name}",
        {"grouped_gemm": _grouped_gemm(name)},
        requires=("triton",),
        devices=("cuda",),
        by_name=True,
    )
    for name in CUTS
)
