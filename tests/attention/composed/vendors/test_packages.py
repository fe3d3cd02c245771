"""flash_attn 3 and 4: which versions are known, and that our side of the calls is exact. Neither runs here."""

from __future__ import annotations

from types import SimpleNamespace

from qtuning_fast.attention.composed.vendors import packages

VENDORS = [packages.FLASH_3, packages.FLASH_4]


def test_packages_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    assert packages._flash_3_missing.__wrapped__(windows=False) == "flash_attn_interface is not installed"
    assert packages._flash_4_missing.__wrapped__() == "flash_attn.cute is not installed"


def test_an_older_flash_attn_is_no_flash_attn_4(monkeypatch, tmp_path):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(packages, "find_spec", lambda name: spec)
    assert packages._flash_4_missing.__wrapped__() == "flash_attn.cute is not installed"
    (tmp_path / "cute").mkdir()
    (tmp_path / "cute" / "interface.py").touch()
    monkeypatch.setattr(packages, "import_module", lambda name: (_ for _ in ()).throw(ImportError("no cutlass")))
    assert packages._flash_4_missing.__wrapped__() == "flash_attn.cute cannot be used: no cutlass"
    interface = SimpleNamespace(_flash_attn_fwd=lambda q, k, v: None, _flash_attn_bwd=lambda q, k, v: None)
    monkeypatch.setattr(packages, "import_module", lambda name: interface)
    assert packages._flash_4_missing.__wrapped__() == "this version of flash_attn.cute is not known"


def flash_3_operators(forward_defaults=True):
    """torch.ops.flash_attn_3 as far as its schemas go."""

    def operator(required, optional, with_defaults=True):
        arguments = [SimpleNamespace(name=name, has_default_value=lambda: False) for name in required]
        arguments += [SimpleNamespace(name=name, has_default_value=lambda: with_defaults) for name in optional]
        return SimpleNamespace(default=SimpleNamespace(_schema=SimpleNamespace(arguments=arguments)))

    options = ["softmax_scale", "is_causal", "window_size_left", "window_size_right"]
    backward = ["dout", "q", "k", "v", "out", "softmax_lse"], ["dq", "dk", "dv", *options]
    return SimpleNamespace(
        fwd=operator(["q", "k", "v"], ["k_new", *options], forward_defaults),
        bwd=operator(*backward),
    )


def test_flash_attn_3_is_known_by_its_schemas(monkeypatch):
    flags = {}
    config = SimpleNamespace(CONFIG={"build_flags": flags})
    monkeypatch.setattr(packages, "find_spec", lambda name: object())
    monkeypatch.setattr(packages, "import_module", lambda name: config)
    monkeypatch.setattr(packages, "_flash_3", flash_3_operators)
    assert packages._flash_3_missing.__wrapped__(windows=False) is None
    flags["FLASHATTENTION_DISABLE_BACKWARD"] = True
    assert packages._flash_3_missing.__wrapped__(windows=False) == "flash_attn_interface was built without BACKWARD"
    flags.clear()
    flags["FLASHATTENTION_DISABLE_LOCAL"] = True
    assert packages._flash_3_missing.__wrapped__(windows=False) is None
    assert packages._flash_3_missing.__wrapped__(windows=True) == "flash_attn_interface was built without LOCAL"
    flags.clear()
    monkeypatch.setattr(packages, "_flash_3", lambda: flash_3_operators(forward_defaults=False))
    assert "not known" in packages._flash_3_missing.__wrapped__(windows=False)


def test_both_passes_are_exact(stand_ins, calls, vendor, case):
    calls.assert_right(vendor, calls.real_call(**calls.CASES[case]), 1e-12, 1e-12)
