"""The pages load nothing from elsewhere, run their own script alone, and escape what they show."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess

import pytest

pytest.importorskip("fastapi", reason="serving needs FastAPI: pip install 'qtuning_fast[serve]'")

from qtuning_fast.serving.gateway import Counting, build
from qtuning_fast.serving.keys import Keys
from qtuning_fast.serving.options import ServingOptions
from qtuning_fast.serving.page import api_page, trial_page


def schema():
    return build(None, ServingOptions(), Keys(), Counting(lambda *a: None, lambda *a: None)).openapi()


@pytest.mark.parametrize("page", [trial_page(ServingOptions()), api_page(schema())], ids=["trial", "api"])
def test_a_page_is_self_contained(page):
    text = page.body.decode()
    assert not re.search(r"(?:https?:)?//[\w.]+\.\w+|@import|url\(", text)
    assert not re.search(r"<(?:link|img|iframe|script)\b[^>]*\b(?:src|href)=", text)
    assert "innerHTML" not in text and "document.write" not in text
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    for script in re.findall(r"<script>(.*?)</script>", text, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]


def test_the_page_of_the_api_names_every_operation_and_field():
    text, description = api_page(schema()).body.decode(), schema()
    for path, methods in description["paths"].items():
        for method in methods:
            assert f"{method.upper()} {path}" in text
    for field in ("texts", "task", "top_k", "timeout", "name_in_index", "label_words", "template", "after", "limit"):
        assert f"<code>{field}</code>" in text, field


def test_what_a_page_shows_is_escaped():
    description = schema()
    description["info"]["title"] = "<script>alert(1)</script>"
    assert "<script>alert(1)" not in api_page(description).body.decode()


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to read the script with")
def test_the_script_is_javascript(tmp_path):
    (script,) = re.findall(r"<script>(.*?)</script>", trial_page(ServingOptions()).body.decode(), re.DOTALL)
    (tmp_path / "page.js").write_text(script)
    subprocess.run(["node", "--check", tmp_path / "page.js"], check=True, timeout=60)
