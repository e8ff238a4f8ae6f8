"""Adapters without their hosts: what the error says, and that nothing is imported before it is asked for."""

import importlib
import sys

import pytest

HOSTS = {
    "laplace": ("laplace", "laplace-torch"),
    "opacus": ("opacus", "opacus"),
    "curvlinops": ("curvlinops", "curvlinops-for-pytorch"),
    "trak": ("trak", "traker"),
    "huggingface": ("transformers", "transformers"),
}


@pytest.mark.parametrize("name", HOSTS)
def test_a_missing_host(name, monkeypatch):
    module, package = HOSTS[name]
    for loaded in [n for n in sys.modules if n == module or n.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"partials.adapters.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module(f"partials.adapters.{name}")
    assert str(error.value).startswith(f"partials.adapters.{name} needs {package} (")
    assert str(error.value).endswith(f": pip install 'partials[{name}]'")
