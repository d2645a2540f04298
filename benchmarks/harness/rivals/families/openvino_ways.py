"""OpenVINO: a model of one product for each layer. Weights are packed in the first call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import openvino
from openvino import opset13

from benchmarks.harness.rivals.contender import Layers, Problem, Way

_MIDDLE = np.array([8], np.uint8)  # a tensor of four bits is made on memory that must stay
_ROUNDS_X = "DYNAMIC_QUANTIZATION_GROUP_SIZE"  # neighbours of x with a scale; 0 keeps x


def _bf16_weight(problem: Problem) -> tuple[Any, int]:
    return opset13.constant(problem.weight.numpy()), 2 * problem.weight.numel()


def _int8_weight(problem: Problem) -> tuple[Any, int]:
    q, scale = problem.int8
    scales = opset13.constant(scale.half().numpy()[:, None])
    weight = opset13.multiply(opset13.convert(opset13.constant(q.numpy()), "f16"), scales)
    return opset13.convert(weight, "f32"), q.nbytes + 2 * len(scale)


def _int4_weight(problem: Problem) -> tuple[Any, int]:
    rows, columns = problem.shape
    packed, scale = problem.nibbles.numpy(), problem.int4[1].half()
    shape = openvino.Shape([rows, columns // problem.group, problem.group])
    values = openvino.Tensor(packed.reshape(-1), shape, openvino.Type.u4)
    middle = openvino.Tensor(_MIDDLE, openvino.Shape([1, 1, 1]), openvino.Type.u4)
    centred = opset13.subtract(
        opset13.convert(opset13.constant(values), "f16"),
        opset13.convert(opset13.constant(middle), "f16"),
    )
    weight = opset13.multiply(centred, opset13.constant(scale.numpy()[..., None]))
    flat = opset13.constant(np.array([rows, columns], np.int64))
    weight = opset13.convert(opset13.reshape(weight, flat, False), "f32")
    return weight, packed.nbytes + scale.nbytes


def _layers(
    weight: Callable[[Problem], tuple[Any, int]], settings: dict[str, Any], problem: Problem
) -> Layers:
    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": problem.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        **settings,
    }  # fmt: skip
    x = {b: openvino.Tensor(of.numpy(), shared_memory=True) for b, of in problem.x.items()}
    rows, columns = problem.shape
    sizes: list[int] = []

    def make() -> Any:
        parameter = opset13.parameter([-1, columns], openvino.Type.f32, name="x")
        values, nbytes = weight(problem)
        sizes.append(nbytes)
        product = opset13.matmul(parameter, values, False, True)
        model = openvino.Model([product], [parameter], "layer")
        return core.compile_model(model, "CPU", options).create_infer_request()

    requests = problem.layers(make)

    def call(i: int, batch: int) -> Any:
        requests[i].set_input_tensor(x[batch])
        requests[i].infer()
        return requests[i].get_output_tensor().data

    return Layers(call, len(requests), sizes[0], rows * columns)


_F32, _BF16 = {"INFERENCE_PRECISION_HINT": "f32"}, {"INFERENCE_PRECISION_HINT": "bf16"}
_KEEPS, _GROUPS = {_ROUNDS_X: 0}, {_ROUNDS_X: 128}
WAYS = (
    Way("OpenVINO bf16", "bf16", partial(_layers, _bf16_weight, _BF16)),
    Way("OpenVINO int8, int8 x", "int8", partial(_layers, _int8_weight, _F32 | _GROUPS)),
    Way("OpenVINO int8 weight, bf16 x", "int8", partial(_layers, _int8_weight, _BF16 | _KEEPS)),
    Way("OpenVINO int4, int8 x", "int4", partial(_layers, _int4_weight, _F32 | _GROUPS)),
    Way("OpenVINO int4 weight, bf16 x", "int4", partial(_layers, _int4_weight, _BF16 | _KEEPS)),
)
