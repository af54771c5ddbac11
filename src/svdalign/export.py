"""Shipping a model: plain ``nn`` modules, and files that run without this library."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ._copying import copied
from ._encoders import settle_fast_path
from ._files import replace_file
from ._tracing import carry_hooks, followers, layers_read, substitute
from .factors import FactoredLayer, factored_layers


def compact(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, made of plain ``nn`` modules, in eval mode.

    Every factored layer becomes an ``nn.Sequential`` of two layers, with ``s`` merged into the
    second, or one dense layer, whichever takes fewer multiply-accumulates. It becomes a dense layer
    in any case if the model's code reads more of it than its output, such as its ``weight``: a tied
    decoder does, and T5, which asks for the weight's dtype. A batch norm is folded into a
    convolution if it is the only reader of the convolution's output; an ``nn.Identity`` takes its
    place. Where ``forward`` cannot be traced (control flow that depends on the data) batch norms
    stay. The function stays the same to rounding.
    """
    model = copied(model).eval().requires_grad_(False)
    for module in model.modules():
        module.__dict__.pop("factorization", None)
    read = layers_read(model, FactoredLayer)
    plain: dict[nn.Module, nn.Module] = {}
    for name, layer in factored_layers(model, every_name=True).items():
        if layer not in plain:
            made = layer.dense() if layer in read else layer.plain()
            plain[layer] = made.eval().requires_grad_(False)
            carry_hooks(layer, plain[layer])
        if not name:
            return plain[layer]
        model.set_submodule(name, plain[layer])
    settle_fast_path(model, {m for m in plain.values() if isinstance(m, nn.Sequential)})
    _fold_batch_norms(model)
    return model


# --- batch norms --------------------------------------------------------------------------------

_FOLDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}


def _fold_batch_norms(model: nn.Module) -> None:
    """Fold every batch norm in ``model`` that can be folded, in place; see :func:`compact`."""
    try:
        pairs = followers(model)
    except Exception:  # tracing runs the user's own code on stand-ins, which can fail in any way
        return
    replaced: dict[nn.Module, nn.Module] = {}
    for names in pairs.items():
        conv, norm = map(model.get_submodule, names)
        if _FOLDS.get(type(conv)) is not type(norm):
            continue
        norm = cast(nn.BatchNorm2d, norm)
        if norm.track_running_stats:
            folded = fuse_conv_bn_eval(cast(nn.Conv2d, conv), norm)
            replaced |= {conv: folded.requires_grad_(False), norm: nn.Identity()}
    substitute(model, replaced)


# --- files --------------------------------------------------------------------------------------


Runner = Callable[[Tensor], Tensor]
"""Computes what a file does."""


def write_safetensors(model: nn.Module, example: Tensor, path: str | Path) -> Runner:
    """Write the weights of ``model``, for a program that builds the same modules.

    Like all writers it returns a function that computes with the file, loaded again. Raises
    ValueError for sparse tensors.
    """
    if sparse := [n for n, t in model.state_dict().items() if t.layout != torch.strided]:
        raise ValueError(
            f"model has sparse tensors, {', '.join(sparse)}, which a safetensors file cannot hold: "
            "make them dense, or buffers with persistent=False"
        )
    tensors = {  # safetensors refuses tensors that share memory, as those of a module of two names
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    content = safetensors.torch.save(tensors, {"format": "pt"})
    replace_file(path, lambda part: part.write_bytes(content))
    again = copy.deepcopy(model)
    for value in (*again.parameters(), *again.buffers()):
        value.data.zero_()
    again.load_state_dict(safetensors.torch.load_file(path))
    return again


def write_pt2(model: nn.Module, example: Tensor, path: str | Path) -> Runner:
    """Write ``model`` as a program that torch alone loads (``torch.export.load``) and runs.

    ``example``: a batch of two or more; the program takes any size.
    """
    with _quiet():
        program = torch.export.export(model, (example,), dynamic_shapes=_any_batch())
        content = io.BytesIO()
        torch.export.save(program, content)
        replace_file(path, lambda part: part.write_bytes(content.getvalue()))
        return torch.export.load(path).module()


def write_onnx(model: nn.Module, example: Tensor, path: str | Path) -> Runner:
    """Write ``model`` as ONNX, with input ``x`` and output ``y``.

    ``example``: a batch of two or more; the graph takes any size. Raises ImportError without the
    extra ``onnx``.
    """
    check_imports("onnx")
    import onnxruntime

    with _quiet():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=_any_batch(),
            input_names=["x"],
            output_names=["y"],
            verbose=False,
        )
    assert program is not None
    content = program.model_proto.SerializeToString()
    replace_file(path, lambda part: part.write_bytes(content))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    return lambda x: torch.from_numpy(session.run(None, {"x": x.cpu().numpy()})[0])


FORMATS: Mapping[str, Callable[[nn.Module, Tensor, str | Path], Runner]] = {
    "safetensors": write_safetensors,
    "pt2": write_pt2,
    "onnx": write_onnx,
}  #: writers by the suffix of their files


def check_imports(name: str) -> None:
    """Raise ImportError, with the command to install it, if what format ``name`` needs is
    missing."""
    if name == "onnx":
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError("ONNX needs the extra: pip install 'svdalign[onnx]'") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporters, which print progress and warn that torchvision is missing."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _any_batch() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch")},)
