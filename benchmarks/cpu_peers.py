"""What `benchmarks/cpu.py` compares with: linears of other libraries on the CPU, each with the weight that it has in float64.

Every function takes K, N and a weight float32 [N, K], and gives entries; one whose library is absent raises ImportError. Peers
are called as their documentation says, on inputs of the dtype that suits them, which they get for free.

    torch          float32, bfloat16 (also prepacked), dynamic quantization per tensor, each engine
    onnxruntime    MatMulNBits with 2, 4 and 8 bits, blocks of 128, accuracy level 4 (8-bit activations)
    openvino       compressed weights u2, u4 (groups of 128) and i8, dynamic quantization in groups of 128
    zentorch       dynamic per-token W8A8, weight-only W4 in groups of 128, bfloat16 prepacked
    bitsandbytes   NF4, blocks of 128
    ggml           Q2_K, TQ2_0, Q3_K, Q4_0, Q4_K, Q8_0, also in its interleaved layouts; DLQC_GGML: the folder of its libraries
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dlqc.formats.integer import IntFormat
from dlqc.formats.packing import pack

Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Entry:
    """One implementation of one shape.

    Attributes:
        name, mode: who, and which comparison it belongs to.
        call: x [M, K] in `dtype` → [M, N].
        weight: float64 [N, K], what it multiplies by; None once `expected` is there.
        expected: float64 [R, N], what it should make of the first rows of the tokens that it will get.
        bytes: stored, of the weight.
    """

    name: str
    mode: str
    call: Call
    weight: torch.Tensor | None
    bytes: float
    dtype: torch.dtype
    expected: torch.Tensor | None = None


def torch_peers(k: int, n: int, w: torch.Tensor) -> list[Entry]:
    """What torch has for weights that are not low-bit, and its dynamic quantization."""
    half = w.bfloat16()
    entries = [
        Entry("torch float32", "fp", lambda x: x @ w.T, w.double(), 4 * n * k, torch.float32),
        Entry("torch bfloat16", "fp", lambda x: x @ half.T, half.double(), 2 * n * k, torch.bfloat16),
    ]
    try:
        ready = torch.ops.mkldnn._reorder_linear_weight(half, None)
        entries.append(
            Entry(
                "torch bfloat16 prepacked",
                "fp",
                lambda x: torch.ops.mkldnn._linear_pointwise(x, ready, None, "none", [], ""),
                *(half.double(), 2 * n * k, torch.bfloat16),
            )
        )
    except (RuntimeError, AttributeError) as error:
        print(f"  torch bfloat16 prepacked: {error}", file=sys.stderr)
    scale = float(w.abs().max()) / 127
    codes = torch.quantize_per_tensor(w, scale, 0, torch.qint8)
    for engine in torch.backends.quantized.supported_engines:
        if engine not in ("fbgemm", "x86", "onednn"):
            continue
        torch.backends.quantized.engine = engine
        packed = torch.ops.quantized.linear_prepack(codes, None)

        def call(x: torch.Tensor, engine: str = engine, packed: Any = packed) -> torch.Tensor:
            torch.backends.quantized.engine = engine
            return torch.ops.quantized.linear_dynamic(x, packed, reduce_range=False)  # type: ignore[no-any-return]

        entries.append(
            Entry(
                f"torch linear_dynamic {engine}", "W8A8 tensor", call, codes.dequantize().double(), n * k, torch.float32
            )
        )
    return entries


def onnx_peers(k: int, n: int, w: torch.Tensor) -> list[Entry]:
    """ONNX Runtime's MatMulNBits, where it is installed."""
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper

    entries = []
    for bits in (2, 4, 8):
        stored = IntFormat(bits, 128).quantize(w)
        blob = pack(stored.codes, bits).reshape(n, k // 128, 16 * bits).numpy()
        scales = stored.scales.float().numpy()
        node = helper.make_node(
            *("MatMulNBits", ["x", "b", "s"], ["y"]),
            domain="com.microsoft",
            K=k,
            N=n,
            bits=bits,
            block_size=128,
            accuracy_level=4,
        )
        graph = helper.make_graph(
            *([node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])]),
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
            [
                helper.make_tensor("b", TensorProto.UINT8, blob.shape, blob.tobytes(), raw=True),
                helper.make_tensor("s", TensorProto.FLOAT, [scales.size], np.ravel(scales).tobytes(), raw=True),
            ],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        )
        model.ir_version = 10
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = ort.InferenceSession(model.SerializeToString(), options)

        def call(x: torch.Tensor, session: Any = session) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

        size = IntFormat(bits, 128).bits_per_weight(n, k) * n * k / 8
        entries.append(
            Entry(f"onnxruntime W{bits}A8 g128", f"W{bits}A8", call, stored.dequantize().double(), size, torch.float32)
        )
    return entries


def openvino_peers(k: int, n: int, w: torch.Tensor) -> list[Entry]:
    """OpenVINO's weight decompression with dynamic quantization in groups of 128, where it is installed."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as op

    entries = []
    for bits, kind in ((2, "u2"), (4, "u4")):
        stored = IntFormat(bits, 128).quantize(w)
        groups, middle = k // 128, sum(1 << (at + bits - 1) for at in range(0, 8, bits))
        # Tensors share the memory of arrays; zero points have to be there for each group, or nothing is quantized on the fly.
        held = pack(stored.codes, bits).numpy(), np.full(n * groups * bits // 8, middle, np.uint8)
        codes, zeros = (
            op.constant(ov.Tensor(part, [n, groups, width], getattr(ov.Type, kind)))
            for part, width in zip(held, (128, 1), strict=True)
        )
        x = op.parameter([-1, k], np.float32)
        centred = op.subtract(op.convert(codes, "f32"), op.convert(zeros, "f32"))
        scaled = op.multiply(centred, op.constant(stored.scales.float().numpy()[..., None]))
        weight = op.reshape(scaled, op.constant(np.array([n, k])), False)
        model = ov.Model([op.matmul(x, weight, False, True)], [x])
        config = {
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        request = ov.Core().compile_model(model, "CPU", config).create_infer_request()

        def call(x: torch.Tensor, request: Any = request, held: Any = held) -> torch.Tensor:
            return torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0])

        size = IntFormat(bits, 128).bits_per_weight(n, k) * n * k / 8
        entries.append(
            Entry(f"openvino W{bits}A8 g128", f"W{bits}A8", call, stored.dequantize().double(), size, torch.float32)
        )
    return entries


def zentorch_peers(k: int, n: int, w: torch.Tensor) -> list[Entry]:
    """zentorch's linears, where it is installed. The unpacked weights of the dynamic ones must stay alive, and scales of groups
    have to be contiguous [G, N]: anything else is wrong without an error."""
    import zentorch  # noqa: F401

    ops = torch.ops.zentorch
    entries = []

    def dynamic(name: str, mode: str, bits: int, group: int | None) -> None:
        stored = IntFormat(bits, group).quantize(w)
        codes = (stored.codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
        held = codes if bits == 8 else ops.zentorch_woq_repack_weight(codes)
        scales = stored.scales[:, 0].float() if bits == 8 else stored.scales.T.contiguous()

        def call(x: torch.Tensor) -> torch.Tensor:
            return ops.zentorch_dynamic_qlinear(x, held, scales)  # type: ignore[no-any-return]

        size = IntFormat(bits, group).bits_per_weight(n, k) * n * k / 8
        entries.append(Entry(name, mode, call, stored.dequantize().double(), size, torch.bfloat16))

    dynamic("zentorch W8A8", "W8A8 channel", 8, None)
    dynamic("zentorch W4A8 channel", "W4A8 channel", 4, None)
    dynamic("zentorch W4A8 g128", "W4A8", 4, 128)
    grouped = IntFormat(4, 128).quantize(w)
    words = ops.zentorch_woq_repack_weight((grouped.codes.to(torch.int16) - 8).to(torch.int8))
    scales = grouped.scales.T.contiguous().bfloat16()
    entries.append(
        Entry(
            *("zentorch W4A16 g128", "W4A16", lambda x: ops.zentorch_woq_linear(x, words.T, scales, None)),
            *(grouped.dequantize().double(), n * k * 4.125 / 8, torch.bfloat16),
        )
    )
    half = w.bfloat16()
    ready = ops.zentorch_weight_prepack_for_linear(half)
    entries.append(
        Entry(
            *("zentorch bfloat16 prepacked", "fp"),
            lambda x: ops.zentorch_linear_unary(x, ready, None, is_weight_prepacked=True),
            *(half.double(), 2 * n * k, torch.bfloat16),
        )
    )
    return entries


def bitsandbytes_peers(k: int, n: int, w: torch.Tensor) -> list[Entry]:
    """bitsandbytes' NF4 in blocks of 128, where it is installed: the layer, as its users have it."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="cpu")
    layer.weight = bnb.nn.Params4bit(
        w.bfloat16(), requires_grad=False, blocksize=128, quant_type="nf4", compress_statistics=False
    )
    layer = layer.to("cpu").eval()
    if layer.weight.quant_state is None:
        layer.weight = layer.weight._quantize("cpu")
    exact = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    return [Entry("bitsandbytes NF4", "W4A16", layer, exact.reshape(n, k), n * k * 4.25 / 8, torch.bfloat16)]


#: ggml's types: number, name, which comparison.
GGML_TYPES = (
    (35, "TQ2_0", "W2A8"), (10, "Q2_K", "W2A8"), (11, "Q3_K", "W3A8"), (2, "Q4_0", "W4A8"), (12, "Q4_K", "W4A8"),
    (8, "Q8_0", "W8A8"),
)  # fmt: skip
GGML_F32 = 0
#: Those that have an interleaved layout on this kind of processor; setting a tensor of another type would end the process.
GGML_INTERLEAVED = ("Q2_K", "Q4_0", "Q4_K")


class _GgmlParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """ggml through its C interface: as much of it as one product needs."""

    def __init__(self) -> None:
        folder = os.environ.get("DLQC_GGML")
        if folder is None:
            import llama_cpp

            folder = str(Path(llama_cpp.__file__).parent / "lib")
        found = {}
        for name in ("ggml-base", "ggml-cpu", "ggml"):
            (path,) = (p for p in Path(folder).rglob(f"lib{name}.so"))
            found[name] = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.base, self.cpu = found["ggml-base"], found["ggml-cpu"]
        pointer = ctypes.c_void_p
        for library, names in (
            (self.base, "ggml_init ggml_new_tensor_2d ggml_mul_mat ggml_new_graph ggml_get_data"),
            (
                self.base,
                "ggml_backend_alloc_ctx_tensors_from_buft ggml_get_type_traits ggml_backend_reg_get_proc_address",
            ),
            (self.base, "ggml_backend_get_device"),
            (self.cpu, "ggml_backend_cpu_init ggml_backend_cpu_reg ggml_backend_cpu_buffer_type"),
        ):
            for name in names.split():
                getattr(library, name).restype = pointer
        self.base.ggml_row_size.restype = ctypes.c_size_t
        self.base.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.backend = pointer(self.cpu.ggml_backend_cpu_init())
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, torch.get_num_threads())
        self.plain = pointer(self.cpu.ggml_backend_cpu_buffer_type())

    def interleaved(self) -> list[ctypes.c_void_p]:
        """The buffer types whose tensors are stored in another order."""
        pointer = ctypes.c_void_p
        registry = pointer(self.cpu.ggml_backend_cpu_reg())
        address = self.base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address)
        found, kinds = extra(pointer(self.base.ggml_backend_get_device(self.backend))), []
        while found and found[len(kinds)]:
            kinds.append(pointer(found[len(kinds)]))
        return kinds

    def context(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.base.ggml_init(_GgmlParams(1 << 20, None, True)))

    def tensor(self, context: ctypes.c_void_p, kind: int, width: int, rows: int) -> ctypes.c_void_p:
        sizes = ctypes.c_int64(width), ctypes.c_int64(rows)
        return ctypes.c_void_p(self.base.ggml_new_tensor_2d(context, ctypes.c_int(kind), *sizes))

    def quantized(self, kind: int, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The bytes of a weight, and what they stand for in float64."""
        n, k = w.shape
        size = self.base.ggml_row_size(ctypes.c_int(kind), ctypes.c_int64(k))
        stored, wide = torch.zeros(n * size, dtype=torch.uint8), torch.zeros(n, k)
        source = w.contiguous()
        self.base.ggml_quantize_chunk(
            *(ctypes.c_int(kind), ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(stored.data_ptr())),
            *(ctypes.c_int64(0), ctypes.c_int64(n), ctypes.c_int64(k), None),
        )
        traits = self.base.ggml_get_type_traits(ctypes.c_int(kind))
        # After name (8 bytes), two int64, size_t and bool with its padding: the function to float32.
        address = ctypes.c_void_p.from_address(traits + 40).value
        widen = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(address or 0)
        widen(stored.data_ptr(), wide.data_ptr(), n * k)
        return stored, wide.double()

    def linear(self, kind: int, stored: torch.Tensor, k: int, n: int, buffer: ctypes.c_void_p) -> Call:
        """x float32 [M, K] → [M, N]; graphs are built once for each M."""
        context = self.context()
        weight = self.tensor(context, kind, k, n)
        if not self.base.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer):
            raise MemoryError("ggml has no memory for the weight")
        self.base.ggml_backend_tensor_set(
            weight, ctypes.c_void_p(stored.data_ptr()), ctypes.c_size_t(0), ctypes.c_size_t(stored.numel())
        )
        graphs: dict[tuple[int, int], tuple[ctypes.c_void_p, torch.Tensor]] = {}

        def call(x: torch.Tensor) -> torch.Tensor:
            # A tensor is copied in once: in a model of ggml's own it would be there already.
            key = x.data_ptr(), x.shape[0]
            if key not in graphs:
                inner, m = self.context(), x.shape[0]
                given = self.tensor(inner, GGML_F32, k, m)
                made = ctypes.c_void_p(self.base.ggml_mul_mat(inner, weight, given))
                graph = ctypes.c_void_p(self.base.ggml_new_graph(inner))
                self.base.ggml_build_forward_expand(graph, made)
                self.base.ggml_backend_alloc_ctx_tensors_from_buft(inner, self.plain)
                ctypes.memmove(self.base.ggml_get_data(given), x.data_ptr(), 4 * x.numel())
                out = (ctypes.c_float * (m * n)).from_address(self.base.ggml_get_data(made))
                graphs[key] = graph, torch.frombuffer(out, dtype=torch.float32).reshape(m, n)
            graph, y = graphs[key]
            self.base.ggml_backend_graph_compute(self.backend, graph)
            return y

        return call


def ggml_peers(k: int, n: int, w: torch.Tensor) -> list[Entry]:
    """ggml's products, in each layout that takes the type."""
    ggml = Ggml()
    entries = []
    for kind, name, mode in GGML_TYPES:
        stored, exact = ggml.quantized(kind, w)
        extra = ggml.interleaved() if name in GGML_INTERLEAVED else []
        for buffer, said in ((ggml.plain, ""), *((kept, " interleaved") for kept in extra)):
            call = ggml.linear(kind, stored, k, n, buffer)
            entries.append(Entry(f"ggml {name}{said}", mode, call, exact, stored.numel(), torch.float32))
    return entries


PEERS = {
    "torch": torch_peers, "onnxruntime": onnx_peers, "openvino": openvino_peers, "zentorch": zentorch_peers,
    "bitsandbytes": bitsandbytes_peers, "ggml": ggml_peers,
}  # fmt: skip
