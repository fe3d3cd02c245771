"""Keys: where they come from, and who may do what."""

import hmac

import pytest

from qtuning_fast.serving.keys import Keys
from qtuning_fast.serving.options import ServingOptions

ASKING, OTHER, ADMIN = "a-key-that-asks-1", "a-key-that-asks-2", "a-key-of-an-admin"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("QTUNING_FAST_KEYS", "QTUNING_FAST_ADMIN_KEYS"):
        monkeypatch.delenv(name, raising=False)


def bearer(key):
    return f"Bearer {key}"


def test_without_keys_this_machine_may_do_everything():
    keys = Keys.read(ServingOptions())
    assert keys.may_ask("") and keys.may_administrate("")


def test_on_another_address_nobody_administrates_without_a_key():
    keys = Keys.read(ServingOptions(host="0.0.0.0", without_keys=True))
    assert keys.may_ask("") and not keys.may_administrate("") and not keys.may_administrate(bearer(ASKING))
    with pytest.raises(ValueError, match="there is no key"):
        Keys.read(ServingOptions(host="0.0.0.0"))


def test_keys_of_the_environment_and_of_files(monkeypatch, tmp_path):
    monkeypatch.setenv("QTUNING_FAST_KEYS", f"{ASKING},{OTHER}")
    (tmp_path / "admin").write_text(f"{ADMIN}\n")
    keys = Keys.read(ServingOptions(host="0.0.0.0", admin_keys_file=str(tmp_path / "admin")))
    for key in (ASKING, OTHER, ADMIN):
        assert keys.may_ask(bearer(key)), key
    assert keys.may_ask(f"bearer  {ASKING}")
    assert [keys.may_administrate(bearer(key)) for key in (ASKING, OTHER, ADMIN)] == [False, False, True]
    for wrong in ("", ASKING, bearer(ASKING[:-1]), bearer(ASKING + "x"), f"Basic {ASKING}", bearer("\udcff")):
        assert not keys.may_ask(wrong) and not keys.may_administrate(wrong), wrong
    assert ASKING not in repr(keys)


def test_a_key_of_administration_alone_guards_questions_too(monkeypatch):
    monkeypatch.setenv("QTUNING_FAST_ADMIN_KEYS", ADMIN)
    keys = Keys.read(ServingOptions())
    assert not keys.may_ask("") and keys.may_ask(bearer(ADMIN)) and not keys.may_administrate("")
    open_keys = Keys.read(ServingOptions(without_keys=True))
    assert open_keys.may_ask("") and not open_keys.may_administrate("")


def test_every_key_is_compared_whichever_is_right(monkeypatch):
    monkeypatch.setenv("QTUNING_FAST_KEYS", f"{ASKING} {OTHER}")
    keys, compared = Keys.read(ServingOptions()), []

    def noted(one, other):
        compared.append(other)
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", noted)
    assert keys.may_ask(bearer(ASKING)) and len(compared) == 2


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("short", "key 1 must have 16 ASCII"),
        (" \n", "holds no key"),
        (f"{ASKING}\nschlüssel-schlüssel", "key 2"),
    ],
)
def test_wrong_keys_are_refused(content, error, tmp_path):
    (tmp_path / "keys").write_text(content)
    with pytest.raises(ValueError, match=error):
        Keys.read(ServingOptions(keys_file=str(tmp_path / "keys")))


def test_keys_and_no_keys_contradict_each_other(monkeypatch, tmp_path):
    monkeypatch.setenv("QTUNING_FAST_KEYS", ASKING)
    with pytest.raises(ValueError, match="without_keys lets anyone ask, but there are keys"):
        Keys.read(ServingOptions(without_keys=True))
    with pytest.raises(OSError, match="nowhere"):
        Keys.read(ServingOptions(keys_file=str(tmp_path / "nowhere")))
