"""onnxruntime: MatMulNBits and its product with dynamic int8. Each layer is a session of its own,
with inputs and outputs bound to memory that is kept. A session packs its weights and keeps what it
was given: it holds two to four times the weight's bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.harness.rivals.contender import Layers, Problem, Way

_DOMAIN = "com.microsoft"
_GENERAL = 0  # the accuracy level of its own choice; 4 rounds x to int8 too


def _session(node: Any, values: dict[str, Any], problem: Problem) -> Any:
    rows, columns = problem.shape
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", rows])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    sets = [helper.make_opsetid("", 17), helper.make_opsetid(_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=sets)
    model.ir_version = 9
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _layers(make: Callable[[], Any], nbytes: int, problem: Problem) -> Layers:
    sessions = problem.layers(make)
    x = {batch: tensor.numpy() for batch, tensor in problem.x.items()}
    y = np.empty((max(x), problem.shape[0]), np.float32)
    bound: dict[tuple[int, int], Any] = {}

    def bind(i: int, batch: int) -> Any:
        binding = sessions[i].io_binding()
        for way, name, array in (("input", "x", x[batch]), ("output", "y", y[:batch])):
            give = getattr(binding, f"bind_{way}")
            give(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        return binding

    def call(i: int, batch: int) -> Any:
        if (i, batch) not in bound:
            bound[i, batch] = bind(i, batch)
        sessions[i].run_with_iobinding(bound[i, batch])
        return y[:batch]

    rows, columns = problem.shape
    return Layers(call, len(sessions), nbytes, rows * columns)


def _bits(bits: int, level: int, problem: Problem) -> Layers:
    """MatMulNBits: a scale for each group, x rounded to int8 by groups at accuracy level 4."""
    rows, columns = problem.shape
    group = problem.group
    shape = rows, columns // group, group * bits // 8
    if bits == 4:
        packed, scale = problem.nibbles.numpy().reshape(shape), problem.int4[1]
    else:
        parts = problem.weight.view(rows, columns // group, group)
        scale = parts.abs().amax(-1) / 127
        packed = (parts / scale[..., None]).round().add(128).numpy().astype(np.uint8).reshape(shape)
    values = {"w": packed, "s": scale.contiguous().numpy().reshape(-1)}
    node = helper.make_node(
        "MatMulNBits", ["x", *values], ["y"], domain=_DOMAIN, K=columns, N=rows, bits=bits,
        block_size=group, accuracy_level=level,
    )  # fmt: skip
    nbytes = sum(value.nbytes for value in values.values())
    return _layers(lambda: _session(node, values, problem), nbytes, problem)


def _dynamic(problem: Problem) -> Layers:
    q, scale = problem.int8
    values = {"w": np.ascontiguousarray(q.numpy().T), "s": scale.numpy()}
    node = helper.make_node("DynamicQuantizeMatMul", ["x", *values], ["y"], domain=_DOMAIN)
    return _layers(lambda: _session(node, values, problem), q.nbytes + scale.nbytes, problem)


WAYS = (
    Way("onnxruntime int4, int8 x", "int4", partial(_bits, 4, 4)),
    Way("onnxruntime int4 weight", "int4", partial(_bits, 4, _GENERAL)),
    Way("onnxruntime int8, int8 x", "int8", partial(_bits, 8, 4)),
    Way("onnxruntime int8, dynamic", "int8", _dynamic),
)
