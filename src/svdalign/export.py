"""Shipping a model: plain ``nn`` modules, and files that run without this library."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import traceback
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

    Args:
        model: what :func:`svdalign.factorize` or :func:`svdalign.fuse` returned, trained or not, or
            a module with such layers in it. It is left as it is.

    Returns:
        The copy, whose parameters need no gradient. Other names of a layer's parameters come with
        its new form: ``fc.0.weight`` and ``fc.1.weight`` for ``fc.U``, ``fc.s``, ``fc.V``.
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

    ``example``: a batch of two or more; the program takes any size. Raises ValueError, with the
    layer and the cause, for a model that torch cannot write so, such as one that loops over its
    batch.
    """
    with _quiet():
        content = io.BytesIO()
        torch.export.save(_program(model, example), content)
        replace_file(path, lambda part: part.write_bytes(content.getvalue()))
        return torch.export.load(path).module()


def write_onnx(model: nn.Module, example: Tensor, path: str | Path) -> Runner:
    """Write ``model`` as ONNX, with input ``x`` and output ``y``.

    ``example`` and errors are those of :func:`write_pt2`; ImportError too, without the extra
    ``onnx``.
    """
    check_imports("onnx")
    import onnxruntime

    with _quiet():
        program = _program(model, example)
        try:
            graph = torch.onnx.export(
                program, dynamo=True, input_names=["x"], output_names=["y"], verbose=False
            )
        except Exception as error:  # torch raises errors of private types here
            cause = _untranslated(program, error)
            raise ValueError(f"model cannot be written as ONNX: {cause}") from error
    assert graph is not None
    content = graph.model_proto.SerializeToString()
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
    """Silence torch's exporters, which print progress, warn that torchvision is missing and log
    what they try."""
    logged = logging.root.manager.disable
    logging.disable()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logged)


def _program(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """``model`` as a graph for batches of any size."""
    if not isinstance(example, Tensor) or len(example) < 2:
        found = f"one of {len(example)}" if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(
            f"example must be a tensor, the model's one input: a batch of two or more, got {found}"
        )
    batch = ({0: torch.export.Dim("batch")},)
    errors: list[Exception] = []
    for strict in (False, True):  # the second is slower, but takes len(x) for no fixed number
        try:
            return torch.export.export(model, (example,), dynamic_shapes=batch, strict=strict)
        except Exception as error:  # torch runs the model's own code, which can fail in any way
            errors.append(error)
    compiled = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    fixed = ["specialized it to be a constant" in str(error) for error in errors]
    if compiled:
        cause = f"module {compiled[0]!r} was compiled by torch.jit"
    elif all(fixed):
        cause = f"its code works only for batches of {len(example)}, as a loop over a batch does"
    else:
        cause = _cause(model, errors[fixed.index(False)])
    raise ValueError(f"model cannot be written for batches of any size: {cause}") from errors[0]


def _cause(model: nn.Module, error: Exception) -> str:
    """The first line of ``error``, which was raised in running ``model``, and the module."""
    paths = {id(module): path for path, module in model.named_modules() if path}
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    running = [paths.get(id(frame.f_locals.get("self"))) for frame in frames]
    where = [f"module {path!r}: " for path in running if path]
    return (where or [""])[-1] + str(error).partition("\n")[0]


def _untranslated(program: torch.export.ExportedProgram, error: BaseException) -> str:
    """Which operation of ``program`` has no counterpart, and the module that calls it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).partition("\n")[0]
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target).rpartition(".")[0] in text:
            path = [*node.meta.get("nn_module_stack", {"": ("",)}).values()][-1][0]
            return f"module {path!r}: {text}"
    return text
