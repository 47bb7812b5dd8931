"""How far a compressed model's answers are from the original's, and how good answers are: one number per sample.

Outputs are what the model returns: a tensor, a tuple or a mapping, the batch in dimension 0. The divergence is the
task's: KL for a classifier, the sum of Bernoulli KLs for many labels, 1 - cosine for vectors, the squared error as a
share of the reference's variance for numbers. All arithmetic is float64. Outputs whose sizes differ from batch to batch
(`Ragged`: one answer a token) are judged piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.utils._pytree import tree_map

from flyweight.budget import METRICS
from flyweight.errors import DataError, ModelError, UsageError
from flyweight.numerics.ragged import Ragged, pieces

__all__ = [
    "TASKS",
    "check_divergence",
    "class_numbers",
    "default_metric",
    "divergence",
    "gauss_newton",
    "infer_task",
    "main_output",
    "other_outputs",
    "quality",
    "reference_variance",
]

EQUAL = 1e-3  # what rounding may leave of a user's divergence between equal outputs
ROUNDING = 1e-5  # below 0: what a user's distance in float32 may round to
TASKS = ("classify", "multilabel", "embed", "regress", "custom")
_PREFERRED = ("logits", "sentence_embedding", "embeddings", "last_hidden_state", "pooler_output")
_FLOAT32_STEP = 2.0**-24  # no float32 probability next to 1 says more than this, so none next to 0 or 1 is trusted more


def main_output(outputs: Any) -> tuple[Tensor, str]:
    """(the one tensor of `outputs` that counts, why this one). Raises ModelError if there is no floating tensor.

    Of a mapping: logits, an embedding, else the first floating tensor that is no loss; of a tuple: the first one.
    """
    if isinstance(outputs, Tensor):
        return outputs, "the only output"
    floating = _floating(outputs)
    for name in _PREFERRED:
        if name in floating:
            return floating[name], f"the output named {name}"
    for name, value in floating.items():
        if name != "loss":
            return value, f"the first floating tensor of {len(outputs)} outputs ({name})"
    raise ModelError(
        "the model's output holds no floating tensor to compare",
        where=f"output of type {type(outputs).__name__}",
        fix="return a tensor, a tuple of tensors or a dict of tensors, or pass divergence=fn",
    )


def other_outputs(outputs: Any) -> list[str]:
    """The names (numbers of a tuple) of the floating outputs, a loss aside, that are not `main_output`."""
    if isinstance(outputs, Tensor):
        return []
    chosen = main_output(outputs)[0]
    return [name for name, value in _floating(outputs).items() if value is not chosen and name != "loss"]


def _floating(outputs: Any) -> dict[str, Tensor]:
    """The floating tensors of a mapping, or by number of a tuple; {} of anything else."""
    pairs = enumerate(outputs) if isinstance(outputs, (tuple, list)) else ()
    named = outputs.items() if isinstance(outputs, Mapping) else pairs
    return {str(k): v for k, v in named if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 0}


def infer_task(outputs: Any, labels: Tensor | None) -> tuple[str, str]:
    """(task, why) from one batch of the original's outputs and, if there are any, labels."""
    tensor, which = main_output(outputs)
    columns = tensor.shape[-1] if tensor.ndim == 2 else 0
    shape = f"{which} is {_shape(tensor)}"
    if labels is not None:
        found = _task_of_labels(tensor, labels)
        if found:
            return found[0], f"{found[1]}; {shape}"
    if columns >= 2 and _sums_to_one(tensor):
        return "classify", f"each row of the output is a distribution; {shape}"
    if "embed" in which or "hidden_state" in which or "pooler" in which:
        return "embed", shape
    if columns >= 2 and bool(((tensor.norm(dim=1) - 1).abs() < 1e-4).all()):
        return "embed", f"each row of the output is a vector of length 1; {shape}"
    if columns >= 2 and _in_unit_range(tensor):
        return "multilabel", f"the outputs lie in 0..1 and do not sum to 1; {shape}"
    if columns >= 2:
        return "classify", f"{shape}, taken as one logit per class; if that is wrong, say task="
    return "regress", f"{shape}, taken as plain numbers; if that is wrong, say task="


def _task_of_labels(tensor: Tensor, labels: Tensor) -> tuple[str, str] | None:
    if labels.ndim == 1 and not labels.is_floating_point() and tensor.ndim == 2 and tensor.shape[1] >= 2:
        return "classify", "the labels are one class number per sample"
    if labels.shape == tensor.shape and labels.ndim == 2 and bool(((labels == 0) | (labels == 1)).all()):
        if labels.shape[1] >= 2 and bool((labels.sum(dim=1) == 1).all()):
            return "classify", "each row of labels has exactly one 1"
        return "multilabel", "the labels are 0 or 1 for every output"
    if labels.numel() == tensor.numel():
        if not labels.is_floating_point() and bool(((labels == 0) | (labels == 1)).all()):
            return "multilabel", "the labels are 0 or 1 for the one output"
        return "regress", "the labels are one number per output"
    return None


def reference_variance(reference: Any) -> float:
    """The variance of the original's outputs over samples, mean over outputs; the unit of regress's divergence.

    Constant outputs (or one sample) have none: then their mean square, and 1 if that is 0 as well. Of Ragged outputs
    every token counts as a sample: its numbers are those of the last dimension, if all pieces have that size.
    """
    parts = [main_output(piece)[0].detach().double() for piece in pieces(reference)]
    rows = torch.cat(_tokens(parts) if len({part.shape[1:] for part in parts}) > 1 else [_rows(part) for part in parts])
    for scale in (rows.var(dim=0, unbiased=False).mean(), rows.square().mean()):
        if float(scale) > 0.0:
            return float(scale)
    return 1.0


def _tokens(parts: list[Tensor]) -> list[Tensor]:
    """The rows "tokens numbers" of outputs that differ in size."""
    same = len({part.shape[-1] for part in parts}) == 1 and parts[0].ndim > 2
    return [part.reshape(-1, part.shape[-1] if same else 1) for part in parts]


def divergence(
    task: str, reference: Any, outputs: Any, *, variance: float | None = None, fn: Callable[..., Any] | None = None
) -> Float64[Tensor, "samples"]:
    """The divergence of `outputs` from `reference`, one number >= 0 per sample; 0 if they are equal.

    classify: KL(reference || outputs) in nats, from logits or (if the reference's rows sum to 1) probabilities.
    multilabel: sum over labels of Bernoulli KLs. embed: 1 - cosine, mean over tokens. regress: mean squared error over
    `variance` (of the whole reference: `reference_variance`; default: of this batch). custom: `fn(reference, outputs)`.
    A sample whose new output is NaN or infinite diverges infinitely. Differentiable in `outputs`. Raises ModelError if
    the reference is NaN itself, DataError if shapes differ, UsageError for an unknown task or an unfit `fn`.
    """
    if isinstance(reference, Ragged):
        scale = reference_variance(reference) if task == "regress" and fn is None and variance is None else variance
        pairs = zip(reference.pieces, outputs.pieces, strict=True)
        return torch.cat([divergence(task, one, other, variance=scale, fn=fn) for one, other in pairs])
    if fn is not None:
        found = _per_sample(fn, (reference, outputs), main_output(reference)[0].shape[0], "divergence")
        if bool((found < -ROUNDING).any()):
            raise _no_divergence(fn, f"{float(found.min()):g}: below 0 worse would count as better")
        return found
    if task not in _DIVERGENCES:
        raise UsageError(f"no divergence is known for task {task!r}", fix="pass divergence=fn(reference, outputs)")
    first, second = main_output(reference)[0].detach().double(), main_output(outputs)[0].double()
    if first.shape != second.shape:
        raise DataError(f"outputs of shape {_shape(second)} cannot be compared with {_shape(first)}")
    if bool((torch.isnan(first) | (first == torch.inf)).any()):
        raise ModelError("the original model answers NaN or infinity", fix="check its weights and this batch")
    broken = _rows(torch.isnan(second) | (second == torch.inf)).any(1)
    scale = reference_variance(first) if variance is None else variance
    result = _DIVERGENCES[task](first, second, scale)
    return torch.where(broken, torch.inf, result.clamp_min(0.0))  # rounding may leave -1e-17


def _classify(reference: Tensor, outputs: Tensor, _: float) -> Tensor:
    if reference.ndim != 2 or reference.shape[1] < 2:
        raise UsageError(
            f"task classify needs one row of class scores per sample, not {_shape(reference)}",
            fix="say task=regress (every number counts) or pass divergence=fn",
        )
    if _sums_to_one(reference):
        log_p, log_q = (_bounded(x).log() for x in (reference, outputs))
        log_p, log_q = log_p.log_softmax(1), log_q.log_softmax(1)
    else:
        log_p, log_q = reference.log_softmax(1), outputs.log_softmax(1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)  # 0 log 0 = 0: classes masked by -inf


def _multilabel(reference: Tensor, outputs: Tensor, _: float) -> Tensor:
    logit = torch.nn.functional.logsigmoid
    if _in_unit_range(reference):
        reference, outputs = _bounded(reference).logit(), _bounded(outputs).logit()
    p, not_p = reference.sigmoid(), (-reference).sigmoid()
    yes = torch.where(p > 0, p * (logit(reference) - logit(outputs)), 0.0)
    no = torch.where(not_p > 0, not_p * (logit(-reference) - logit(-outputs)), 0.0)
    return _rows(yes + no).sum(1)


def _embed(reference: Tensor, outputs: Tensor, _: float) -> Tensor:
    if reference.ndim < 2:
        raise UsageError(f"task embed needs a vector per sample, not {_shape(reference)}", fix="say task=regress")
    norms = reference.norm(dim=-1) * outputs.norm(dim=-1)
    cosine = torch.where(norms > 0, (reference * outputs).sum(-1) / norms, (reference == outputs).all(-1).double())
    return _rows(1 - cosine).mean(1)


def _regress(reference: Tensor, outputs: Tensor, variance: float) -> Tensor:
    return _rows((outputs - reference).square()).mean(1) / variance


_DIVERGENCES = {"classify": _classify, "multilabel": _multilabel, "embed": _embed, "regress": _regress}


def gauss_newton(task: str, outputs: Tensor, noise: Tensor, variance: float = 1.0) -> Float64[Tensor, ""]:
    """A number whose gradient in any x that `outputs` y depends on is J^T F e: J = dy/dx, e = `noise`, shaped as y.

    F F^T is the Hessian of divergence(task, y, y') in y' at y' = y, so for standard normal e these gradients have the
    Gauss-Newton matrix J^T F F^T J of the divergence as their second moment. An unknown task counts as regress.
    Source: Schraudolph 2002, "Fast curvature matrix-vector products", section 3; F by Martens 2014, arXiv:1412.1193.
    """
    y, e = outputs.double(), noise.double()
    if task == "classify":
        y = _bounded(y).log() if _sums_to_one(y) else y
        p = y.detach().softmax(-1)
        factor = p.sqrt() * e - p * (p.sqrt() * e).sum(-1, keepdim=True)  # F F^T = diag(p) - p p^T
    elif task == "multilabel":
        y = _bounded(y).logit() if _in_unit_range(y) else y
        factor = (y.detach().sigmoid() * (-y.detach()).sigmoid()).sqrt() * e
    elif task == "embed":
        norm = y.detach().norm(dim=-1, keepdim=True)
        way = y.detach() / norm
        factor = (e - way * (way * e).sum(-1, keepdim=True)) / norm * (len(y) / max(1, norm.numel())) ** 0.5
    else:
        factor = e * (2 * len(y) / max(1, y.numel()) / variance) ** 0.5
    usable = y.detach().isfinite() & factor.isfinite()  # no masked class and no vector of length 0
    return torch.where(usable, y, 0.0).mul(torch.where(usable, factor, 0.0)).sum()


# --- quality against labels ------------------------------------------------------------------------------------------


def default_metric(task: str) -> str | None:
    """The metric that task has with labels if the user names none; None where there is none."""
    return {"classify": "accuracy", "multilabel": "accuracy", "regress": "squared_error"}.get(task)


def quality(task: str, outputs: Any, labels: Any, metric: str | Callable[..., Any]) -> Float64[Tensor, "samples"]:
    """The metric of each sample: a name (accuracy, top5, squared_error, absolute_error) or `fn(outputs, labels)`.

    accuracy is 1 or 0 for a classifier, the share of labels that are right (at 0.5) for many labels. Raises
    UsageError if `fn` raises or does not return one finite number per sample, DataError if labels do not fit.
    """
    if isinstance(outputs, Ragged):
        pairs = zip(outputs.pieces, labels.pieces, strict=True)
        return torch.cat([quality(task, one, truth, metric) for one, truth in pairs])
    tensor = main_output(outputs)[0].detach()
    if callable(metric):
        return _per_sample(metric, (outputs, labels), tensor.shape[0], "metric")
    if metric not in METRICS:
        raise UsageError(f"there is no metric {metric!r}", fix=f"use one of {', '.join(METRICS)} or a function")
    truth = torch.as_tensor(labels)
    if len(truth) != len(tensor):
        raise DataError(f"{len(truth)} labels cannot be compared with {len(tensor)} outputs")
    if metric in {"squared_error", "absolute_error"} and task != "classify":
        return _number_error(tensor, truth, metric)
    if task == "classify" and metric in {"accuracy", "top5"}:
        classes = class_numbers(truth, tensor)
        best = tensor.topk(min(5, tensor.shape[1]), dim=1).indices if metric == "top5" else tensor.argmax(1)[:, None]
        # NaN counts as the largest score in torch: an answer of NaN is no answer
        return ((best == classes[:, None]).any(1) & ~tensor.isnan().any(1)).double()
    if task == "multilabel" and metric == "accuracy":
        return _label_accuracy(tensor, truth)
    raise UsageError(f"metric {metric!r} has no meaning for task {task}", fix="pass metric=fn(outputs, labels)")


def class_numbers(labels: Tensor, outputs: Tensor) -> Tensor:
    """Labels as class numbers 0..classes-1, from numbers or one-hot rows. Raises DataError if they do not fit."""
    if outputs.ndim != 2:
        raise DataError(f"task classify needs one row of class scores per sample, not {_shape(outputs)}")
    if labels.ndim == 2 and labels.shape == outputs.shape and labels.shape[1] > 1:
        return labels.argmax(1)
    if labels.numel() != len(outputs):
        raise DataError(f"labels of shape {_shape(labels)} do not fit outputs of shape {_shape(outputs)}")
    flat = labels.reshape(-1)
    if flat.is_floating_point() and not bool((flat == flat.round()).all()):
        raise DataError("labels of a classifier are class numbers, but these are fractions", fix="say task=regress")
    numbers = flat.long()
    least, most, classes = int(numbers.min()), int(numbers.max()), outputs.shape[1]
    if least < 0 or most >= classes:
        raise DataError(
            f"the labels run from {least} to {most}, the model's classes from 0 to {classes - 1}",
            fix="number the classes from 0" if most == classes else "check the labels",
        )
    return numbers


def _number_error(tensor: Tensor, truth: Tensor, metric: str) -> Tensor:
    if truth.numel() != tensor.numel():
        raise DataError(f"labels of shape {_shape(truth)} do not fit outputs of shape {_shape(tensor)}")
    difference = _rows(tensor.double()) - truth.double().reshape(len(tensor), -1)
    return (difference.square() if metric == "squared_error" else difference.abs()).mean(1)


def _label_accuracy(tensor: Tensor, truth: Tensor) -> Tensor:
    if truth.numel() != tensor.numel():
        raise DataError(f"labels of shape {_shape(truth)} do not fit outputs of shape {_shape(tensor)}")
    answers = tensor >= (0.5 if _in_unit_range(tensor) else 0.0)
    right = (answers == (truth.reshape(tensor.shape) > 0.5)) & ~tensor.isnan()
    return _rows(right.double()).mean(1)


def check_divergence(fn: Callable[..., Any], outputs: Any) -> None:
    """Raises UsageError for a likeness instead of a divergence: equal outputs are apart, or others are nearer than equal."""
    found = divergence("custom", outputs, outputs, fn=fn)
    if float(found.max()) > EQUAL:
        raise _no_divergence(fn, f"{float(found.max()):g} for equal outputs")
    divergence(
        "custom", outputs, tree_map(lambda x: x.roll(1, 0) if isinstance(x, Tensor) and x.ndim else x, outputs), fn=fn
    )


def _no_divergence(fn: Callable[..., Any], returned: str) -> UsageError:
    return UsageError(
        f"the divergence function returned {returned}",
        where=getattr(fn, "__name__", type(fn).__name__),
        why="a divergence is 0 for equal outputs and grows with the distance",
        fix="return a distance (for a likeness s in 0 … 1: 1 - s)",
    )


def _per_sample(fn: Callable[..., Any], arguments: tuple[Any, Any], samples: int, what: str) -> Tensor:
    """What the user's function says, checked: one finite number per sample."""
    name = getattr(fn, "__name__", type(fn).__name__)
    try:
        returned = fn(*arguments)
        if returned is None:
            raise ValueError("it returns nothing")
        result = torch.as_tensor(returned).detach().to(torch.float64)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise UsageError(
            f"the {what} function raised {cause}", where=name, fix="it gets the model's outputs and the labels"
            if what == "metric" else "it gets the original's outputs and the new ones",
        ) from error  # fmt: skip
    if result.shape != (samples,):
        aggregate = "; for numbers that are no means (F1, mAP) use evaluate=" if what == "metric" else ""
        raise UsageError(
            f"the {what} function returned shape {_shape(result)} for {samples} samples",
            where=name,
            why="one number per sample gives intervals",
            fix=f"return a tensor of shape [{samples}]{aggregate}",
        )
    if not bool(result.isfinite().all()):
        raise UsageError(
            f"the {what} function returned {float(result[~result.isfinite()][0])}",
            where=f"{name}, sample {int((~result.isfinite()).int().argmax())} of the batch",
            fix="return finite numbers",
        )
    return result


def _sums_to_one(tensor: Tensor) -> bool:
    # 1e-3: float32 and even float16 softmax over many classes rounds its sum by less
    return _in_unit_range(tensor) and bool(((tensor.double().sum(1) - 1).abs() < 1e-3).all())


def _in_unit_range(tensor: Tensor) -> bool:
    return bool(((tensor >= 0) & (tensor <= 1)).all())


def _bounded(probabilities: Tensor) -> Tensor:
    return probabilities.clamp(_FLOAT32_STEP, 1 - _FLOAT32_STEP)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1)


def _shape(tensor: Tensor) -> str:
    return "×".join(str(size) for size in tensor.shape) or "()"
