"""Networks of users, named `package.module:function`.

The function has the keywords `classes`, `channels`, `dropout` and `rngs`, and returns a Flax NNX
network, see `docs/howto/own-network.md`. Runs and recipe files store its name only. Importing a
module executes its code, so the module is imported only if the user has named it: with `train
--model`, with the environment variable `PERTURBJAX_MODEL`, or with `allow_network`.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.models.mode import Mode, Outputs

#: Environment variable that allows one network.
VARIABLE = "PERTURBJAX_MODEL"
#: Fact of a run: SHA-256 of the file that defines its network.
_DIGEST = "network_sha256"
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_allowed: set[str] = set()


def is_user_network(name: str) -> bool:
    """Return whether a name refers to a network outside of perturbjax."""
    return ":" in name


def allow_network(name: str) -> None:
    """Allow the import of a network in this process.

    Args:
        name: `package.module:function`.
    """
    _allowed.add(name)


def create_user_network(
    name: str, *, classes: int, channels: int, image_size: int, **settings: Any
) -> nnx.Module:
    """Create a network of a user, and check its outputs without computing them.

    Args:
        name: `package.module:function`.
        classes: width of the logits.
        channels: image channels, without the mask.
        image_size: height and width of the network input in pixels.
        settings: further arguments of the function: `dropout` and `rngs`.

    Raises:
        InputError: the name is not allowed, the module cannot be imported, or the network fails or
            has other outputs than `Outputs`.
    """
    function = _import_function(name)
    try:
        network = function(classes=classes, channels=channels, **settings)
    except Exception as error:  # the code of a user can raise any type
        raise InputError(f"--model {name}: the function fails ({_describe(error)})") from error
    if not isinstance(network, nnx.Module):
        raise InputError(
            f"--model {name}: returns {type(network).__name__}; return a Flax network (nnx.Module)"
        )
    _check_variables(name, network)
    _check_outputs(name, network, (2, image_size, image_size, 1 + channels), classes)
    return network


def code_facts(name: str) -> dict[str, str]:
    """Return the SHA-256 of the file that defines a network; nothing for networks of perturbjax.

    Raises:
        InputError: the name is not allowed, or the module cannot be imported.
    """
    if not is_user_network(name):
        return {}
    module = _import_module(name)
    content = Path(module.__file__).read_bytes() if module.__file__ else b""
    return {_DIGEST: hashlib.sha256(content).hexdigest()}


def warn_about_changed_code(name: str, facts: dict[str, Any]) -> None:
    """Print a warning if a network has other code than in the training.

    Args:
        name: name of the network.
        facts: facts of the run.
    """
    if _DIGEST in facts and facts[_DIGEST] != code_facts(name).get(_DIGEST):
        console.print(
            f"warning: the file of {name} was changed after the training, so the predictions can "
            "differ"
        )


def _import_function(name: str) -> Callable[..., Any]:
    module, function = _import_module(name), name.partition(":")[2]
    if not callable(factory := getattr(module, function, None)):
        raise InputError(f"--model {name}: {module.__name__} has no function {function}")
    return factory


def _import_module(name: str) -> ModuleType:
    if not _NAME.fullmatch(name):
        raise InputError(f"--model {name}: write a network as package.module:function")
    if name not in _allowed and os.environ.get(VARIABLE) != name:
        raise InputError(
            f"--model {name}: is code outside of perturbjax, named by a run or a recipe file. If "
            f"you trust it, set the environment variable {VARIABLE}={name}"
        )
    # An installed command does not search the working directory.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name.partition(":")[0])
    except Exception as error:
        raise InputError(
            f"--model {name}: the module cannot be imported ({_describe(error)}). Install it, or "
            "set PYTHONPATH to its folder"
        ) from error


def _check_variables(name: str, network: nnx.Module) -> None:
    """Check that all variables are parameters or running statistics."""
    for path, variable in nnx.to_flat_state(nnx.state(network)):
        if not issubclass(variable.type, nnx.Param | nnx.BatchStat):
            raise InputError(
                f"--model {name}: {'.'.join(map(str, path))} is a {variable.type.__name__}; only "
                "Param and BatchStat are trained and stored. For dropout use "
                "perturbjax.models.layers.dropout"
            )


def _check_outputs(name: str, network: nnx.Module, shape: tuple[int, ...], classes: int) -> None:
    graphdef, state = nnx.split(network)
    x, count = jnp.zeros(shape), shape[0]
    train = Mode(
        train=True, weight=jnp.ones(count), keys=jax.random.split(jax.random.key(0), count)
    )
    for mode in (Mode(), train):
        try:
            outputs = jax.eval_shape(lambda s, x, m=mode: nnx.merge(graphdef, s)(x, m), state, x)
        except Exception as error:
            raise InputError(
                f"--model {name}: the network fails on an input of shape {shape} "
                f"({_describe(error)})"
            ) from error
        if not isinstance(outputs, Outputs):
            raise InputError(
                f"--model {name}: the network returns {type(outputs).__name__}; return "
                "perturbjax.Outputs(logits, features)"
            )
        if outputs.logits.shape != (count, classes):
            raise InputError(
                f"--model {name}: logits have shape {outputs.logits.shape}; expected "
                f"{(count, classes)} for {count} sites and {classes} classes"
            )
        if outputs.features.ndim != 2 or len(outputs.features) != count:
            raise InputError(
                f"--model {name}: features have shape {outputs.features.shape}; expected "
                f"({count}, number of features)"
            )


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
