"""Floating-point operations of a program, counted from the shapes of its matrix products."""

import math
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count_flops(traced: Any) -> int:
    """Count the operations of all matrix products, as two for each multiplication and addition.

    A scan counts as often as it runs. What the backward pass computes again counts again, and
    results that nothing uses do not count. Elementwise operations are left out: in a language
    model they are few.

    Args:
      traced: a traced program of one device, such as `StepProgram.trace` returns.
    """
    closed = traced.jaxpr
    used, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _count(used)


def _count(jaxpr: Any) -> int:
    return sum(map(_count_equation, jaxpr.eqns))


def _count_equation(equation: Any) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        return _dot_general(equation)
    if name == "ragged_dot_general":
        return _ragged_dot(equation)
    inner = [_count(_open(jaxpr)) for jaxpr in _jaxprs(equation.params)]
    if name == "cond":
        return max(inner)
    return equation.params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _dot_general(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)


def _ragged_dot(equation: Any) -> int:
    """Count a product in which each row of the left matrix meets the matrix of its group."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if set(numbers.lhs_ragged_dimensions) <= set(contracted):
        # The gradient of the matrices: the result has one matrix for each group, and each row
        # of the operands is in one of them.
        result = result[1:]
    return 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)


def _jaxprs(params: Any) -> list[Any]:
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, _JAXPRS))
    return [leaf for leaf in leaves if isinstance(leaf, _JAXPRS)]


_JAXPRS = (core.Jaxpr, core.ClosedJaxpr)


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
