"""Pages that show sagas, read only: an ASGI app to mount, so that the host's authentication applies."""

try:
    import jinja2 as _jinja2  # noqa: F401 - whether it is there
    import starlette as _starlette  # noqa: F401 - whether it is there
except ImportError as _exc:
    raise ImportError(f"saga_store.web needs {_exc.name}: pip install saga-store[web]") from _exc

from saga_store.web.app import create_app, render_saga

__all__ = ["create_app", "render_saga"]
