"""Which routers a module holds: those that are parts of it, and those that an adapter attached to parts of it.

An attached router is no submodule: the parameters, buffers, `state_dict` and module names of the model that it is
plugged into stay as they are.
"""

from __future__ import annotations

from torch import nn

from sinkroute.routing.router import Router

__all__ = ["ATTACHED", "attach", "attached", "detach", "named_routers", "require_model"]

ATTACHED = "_sinkroute_router"
"""Where a module has the router that was attached to it."""


def attach(host: nn.Module, router: Router) -> None:
    """Make `router` that of `host`, which is where `set_step` and `LoadMonitor` find it."""
    vars(host)[ATTACHED] = router  # not setattr: that would register it


def attached(host: nn.Module) -> Router | None:
    """The router that was attached to `host`."""
    router = vars(host).get(ATTACHED)
    assert router is None or isinstance(router, Router)
    return router


def detach(host: nn.Module) -> None:
    """Undo `attach`."""
    vars(host).pop(ATTACHED, None)


def named_routers(module: nn.Module) -> dict[str, Router]:
    """Path in `module` → router, in the module's order; an attached router has the path of its host.

    >>> import sinkroute
    >>> model = nn.Sequential(nn.Linear(8, 4), sinkroute.create_router("softmax", num_experts=4, top_k=2))
    >>> attach(model[0], sinkroute.create_router("ssr-l", num_experts=4, top_k=2))
    >>> {path: type(router).__name__ for path, router in named_routers(model).items()}
    {'0': 'SSRLinearRouter', '1': 'SoftmaxRouter'}
    >>> list(model.state_dict())
    ['0.weight', '0.bias']
    """
    require_model(module)
    found: dict[str, Router] = {}
    for path, part in module.named_modules():
        router = part if isinstance(part, Router) else attached(part)
        if router is not None and all(router is not other for other in found.values()):
            found[path] = router
    return found


def require_model(model: object) -> None:
    """Raise a `TypeError` with the cure unless this is a `torch.nn.Module`.

    >>> require_model([nn.Linear(2, 2), nn.Linear(2, 2)])
    Traceback (most recent call last):
    TypeError: model must be a torch.nn.Module, got a list of 2; call it for each model in it
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, str):
        got = f"the str {model!r}; load what has that name first, such as by "
        got += "transformers.AutoModelForCausalLM.from_pretrained, and pass the model"
    elif isinstance(model, type):
        got = f"the class {model.__name__}; make a model of it, and pass that"
    elif isinstance(model, (list, tuple)):
        got = f"a {type(model).__name__} of {len(model)}; call it for each model in it"
    else:
        got = f"{model!r} ({type(model).__name__}); pass the model that holds the mixture-of-experts layers"
    raise TypeError(f"model must be a torch.nn.Module, got {got}")
