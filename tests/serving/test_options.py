"""Options of a server: what is wrong is refused by name, whether typed as an option or as a word."""

import pytest

from qtuning_fast.serving.options import ServingOptions


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"port": 70_000}, "port is 70000; it must be 65535 at most"),
        ({"port": 8081}, "metrics_port is 8081, and so is port"),
        ({"timeout": 0.0}, "timeout is 0; it must be positive"),
        ({"batch": 5000}, "batch is 5000; it must be 1024 at most"),
        ({"replicas": 0}, "replicas is 0; it must be at least 1"),
        ({"device_mb": 8}, "device_mb is 8; it must be twice max_adapter_mb at least, 32"),
        ({"gpus": 1.5}, "gpus is 1.5; it must be a share of one GPU, or a whole number"),
        ({"host": " "}, "host is empty"),
    ],
)
def test_wrong_options_are_refused_by_name(given, error):
    with pytest.raises(ValueError, match=error):
        ServingOptions(**given)


def test_words_become_options():
    options = ServingOptions.from_words(
        {"replicas": "3", "timeout": "2.5", "metrics_by_task": "true", "threads": "2", "adapters": "/shared"}
    )
    expected = ServingOptions(replicas=3, timeout=2.5, metrics_by_task=True, threads=2, adapters="/shared")
    assert options == expected


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"replica": "3"}, "replica: no such option; there are host, port"),
        ({"replicas": "three"}, "replicas is 'three'; it must be an integer"),
        ({"timeout": "long"}, "timeout is 'long'; it must be a number"),
        ({"without_keys": "perhaps"}, "without_keys is 'perhaps'; it must be true or false"),
    ],
)
def test_wrong_words_are_refused_by_name(words, error):
    with pytest.raises(ValueError, match=error):
        ServingOptions.from_words(words)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("10.1.2.3", False)],
)
def test_what_others_reach_needs_a_key_or_a_flag(host, loopback):
    options = ServingOptions(host=host)
    assert options.is_loopback is loopback
    options.check_reachable(has_keys=True)
    ServingOptions(host=host, without_keys=True).check_reachable(has_keys=False)
    if loopback:
        options.check_reachable(has_keys=False)
        return
    with pytest.raises(ValueError, match="which others reach, but there is no key: set QTUNING_FAST_KEYS"):
        options.check_reachable(has_keys=False)
