"""The page says what the files say: no more, and nothing else."""

import copy
import json

import pytest

from qtuning_fast.bench import results
from qtuning_fast.bench.report import performance
from qtuning_fast.bench.report.performance import BEGIN, END, page, read, with_figures
from qtuning_fast.bench.report.targets import TARGETS, Target


def timing(ms):
    eager = {"median": ms, "spread": ms / 10, "rounds": 5, "fastest": ms}
    return {"graph": None, "eager": eager, "graph_error": "", "error": ""}


def row(ms, peak=None, error=""):
    passes = {"forward": timing(ms / 3), "backward": timing(2 * ms / 3), "step": timing(ms)}
    return {"errors": {"output": 1e-7, "key": 1e-6}, "peak": peak, "error": error, **passes}


def entry(name, rows, **shape):
    sizes = {"name": name, "of": "a model", "B": 2, "N": 8, "M": 8, "P": 4, "trained": True} | shape
    floors = {which: [0.5, "bytes"] for which in ("forward", "backward", "step")}
    work = {"forward": {"flops": 1e9}}
    return {"shape": sizes, "title": "B2 N8", "dtype": "float32", "floor_ms": floors, "rows": rows, "work": work}


def document(question, entries, device="cpu"):
    facts = {"type": device, "name": "a device", "threads": 2, "GiB": 140}
    versions = {"torch": "2", "triton": "3", "transformers": "5"}
    found = {"question": question, "command": f"python -m qtuning_fast.bench.{question} --out x.json"}
    found |= {"device": facts, "versions": versions, "date": "2026-01-01 00:00", "commit": "abc", "modified": False}
    found |= {"load_before": 0.1, "digests": results.digests(), "ceilings": {"flops": 1e12}}
    return found | {"entries": entries, "errors": {}, "sizes": {"tasks": 30}}


def tasks(grow):
    names = ("step_ms", "anchor_ms", "step_over_anchor", "resident_bytes", "adapter_bytes", "between_seconds")
    per_task = [{"task": i, **dict.fromkeys(names, 1.0 + grow * i)} for i in range(1, 31)]
    ratios = dict.fromkeys(names, 1.0 + grow)
    return {"about": "a method", "per_task": per_task, "verdict": {"ratios": ratios, "flat": {}, "limits": {}}}


def inferring(score, forward):
    said = {"fit_seconds": 1.5, "score_ms": 1.8}
    found = {"predicted": said, "fit_seconds": {"median": 2.5}, "fit_peak_bytes": 3 << 20}
    found |= {"statistics_bytes": 4 << 20, "rule_bytes": 5 << 20}
    return found | {"ms": {"score": {"median": score}, "forward": {"median": forward}, "record": {"median": 3.0}}}


@pytest.fixture
def documents():
    peers = {"native": row(2.0, 20), "native-again": row(2.0), "eager": row(6.0, 50), "sdpa": row(1.0, 10)}
    peers["reference"] = row(7.0)
    failed = row(1.0, error="NotImplementedError: no backward") | {"step": {"graph": None, "eager": None}}
    attention = {"long-2048-cpu": entry("long-2048-cpu", peers | {"flex": failed})}
    decoding = {"decode-cpu": entry("decode-cpu", {"composed": row(1.0), "sdpa-no-concat": row(2.0)}, trained=False)}
    whole = {"all": row(4.0)} | {f"without {x}": row(3.0) for x in ("gate", "reweighting", "bank", "padding", "any")}
    points = {"1": {"composed": row(1.0), "eager": row(3.0)}, "2": {"composed": row(2.0), "eager": row(6.0)}}
    trained = {"timing": {"median": 5.0, "spread": 0.1}, "tokens_per_second": 1234.5, "peak_bytes": 1 << 20}
    trained |= {"trainable_parameters": 7, "difference": None, "error": ""}
    refused = trained | {"timing": None, "tokens_per_second": None, "peak_bytes": None, "error": "it cannot"}
    mixed = {name: timing(ms) for name, ms in (("one-task", 10.0), ("named-16", 12.0))}
    inferred = {"of": "BERT", "sizes": {"hidden": 384, "samples": 16}, "rows": {"2000": inferring(2.0, 10.0)}}
    inferred["passes_to_record"] = 8
    packed = {"about": "texts", "over": "padded", "shapes": {"padded": "B2", "packed": "B1"}}
    packed["rows"] = {"padded": row(8.0), "packed": row(3.0)}
    beside = {"0": {"native": row(1.0), "sdpa": row(2.0)}, "2": {"native": row(3.0), "sdpa": row(8.0)}}
    grown = {"of": "N", "title": "B2", "pass": "step", "points": points, "peers": ["composed", "eager"]}
    return {
        "attention": document("attention", attention),
        "decode": document("decode", decoding),
        "ingredients": document("ingredients", {"x": {"name": "x", "peer": "composed", "title": "B2", "rows": whole}}),
        "growth": document("growth", {"N": grown}),
        "drop_in": document("drop_in", {"packed": packed}),
        "busy": document("busy", {"N128": {"about": "B2 N128", "of": "MiniLM", "beside": beside}}),
        "lifelong": document("lifelong", {"queue": tasks(0.0), "accumulate": tasks(0.5)}),
        "models": document("models", {"bert": {"of": "BERT", "rows": {"qtuning_fast": trained, "flex": refused}}}),
        "mixed_tasks": document("mixed_tasks", {"forward": {"rows": mixed}}),
        "task_inference": document("task_inference", {"bert-cpu": inferred}),
    }


def line(text, words):
    [found] = [each for each in text.splitlines() if words in each]
    return found


def test_targets_are_met_or_not_or_not_measured(documents):
    text, on_a_gpu = page({"cpu": documents}).split("### On a GPU")
    assert "| ≤ 1.1 | 2.000 | **not met** |" in line(text, "native over sdpa, long-2048-cpu")
    assert "| ≥ 3 | 3.500 | met |" in line(text, "reference over native, long-2048-cpu")
    assert "| ≤ 1.1 |  | not measured |" in line(text, "native over sdpa, minilm-cpu")
    assert "| ≤ 1 | 0.333 | met |" in line(text, "native over the fastest with a gate, worst shape, step")
    assert "| ≤ 1.15 | 1.200 | **not met** |" in line(text, "16 tasks over one task")
    assert "| ≤ 0.5 | 0.375 | met |" in line(text, "packed over padded")
    beside_two = "two busy processes, native over the worst of sdpa and torch.compile, N128"
    assert "| ≤ 1 | 0.750 | met |" in line(text, beside_two)  # 3 over 4
    assert "| native, B2 N128 | 1 ms |  | 3.00 × |" in on_a_gpu
    assert "| ≤ 1.3 |  | not measured |" in line(text, "a window over as many scores")
    assert "| ≤ 0.1 | 0.200 | **not met** |" in line(text, "scoring 2,000 tasks over a forward pass, bert-cpu")
    assert "| ≤ 0.1 |  | not measured |" in line(text, "scoring 2,000 tasks over a forward pass, bert-base")
    assert "| 1.000 | met |" in line(text, "step, last ten of 200 tasks over tasks 6 to 15")
    rows = [each for each in on_a_gpu.partition("\n## ")[0].splitlines() if each.startswith("| ")][1:]
    assert len(rows) == sum(p.device == "cuda" for p in TARGETS) > 30
    assert all(each.endswith("|  | not measured |") for each in rows)


def test_a_stream_that_is_too_short_does_not_count_as_flat(documents):
    documents["lifelong"]["sizes"]["tasks"] = 200
    on_a_cpu = page({"cpu": documents}).split("### On a GPU")[0]
    assert "| ≤ 1.05 |  | not measured |" in line(on_a_cpu, "step, last ten of 200 tasks over tasks 6 to 15")


def test_ratios_are_by_one_clock(documents):
    rows = documents["attention"]["entries"]["long-2048-cpu"]["rows"]
    rows["native"]["step"]["graph"] = timing(0.1)["eager"]  # which sdpa has not
    assert "| ≤ 1.1 | 2.000 |" in line(page({"cpu": documents}), "native over sdpa, long-2048-cpu")
    rows["sdpa"]["step"]["graph"] = timing(0.1)["eager"]
    assert "| ≤ 1.1 | 1.000 |" in line(page({"cpu": documents}), "native over sdpa, long-2048-cpu")


def test_a_target_for_a_gpu_reads_the_gpu_s_files():
    rows = {"composed": row(1.1), "context-alone": row(0.6), "context-alone-cudnn": row(0.5)}
    rows |= {"composed-frozen-gate": row(1.0), "flex-frozen-gate": row(2.0)}
    gpu = {"attention": document("attention", {"long": entry("long", rows, N=8, P=4)}, "cuda")}
    text = page({"h200": gpu})
    assert "| ≤ 1.08 | 1.100 | **not met** |" in line(text, "composed over context alone × (1 + 2P/N), long")
    assert "| ≥ 1.5 | 2.000 | met |" in line(text, "flex-frozen-gate over composed-frozen-gate, long")
    share = 1e9 / (1.1e-3 / 3) / 1e12  # of a ceiling of 1e12
    assert f"| {share:.3f} | met |" in line(text, "share of the matrix-product ceiling")
    assert "No figure has been measured on a GPU" not in text


def test_what_gate_and_reweighting_cost_stands_beside_the_floor():
    rows = {"fused": row(4.0), "fused-plain": row(3.5)}
    gpu = {"attention": document("attention", {"vit-b16": entry("vit-b16", rows)}, "cuda")}
    floor = gpu["attention"]["entries"]["vit-b16"]["floor_ms"]["step"][0]
    said = f"1.143 (the roofline is {floor / 4:.0%} of fused, {floor / 3.5:.0%} of fused-plain)"
    assert f"| ≤ 1.15 | {said} | met |" in line(page({"h100": gpu}), "fused over fused-plain, vit-b16")


def test_without_figures_of_a_gpu_it_says_so(documents):
    assert "No figure has been measured on a GPU yet" in page({"cpu": documents})


def test_each_section_names_its_command_and_whether_the_code_has_changed(documents):
    stale = copy.deepcopy(documents)
    stale["growth"]["digests"]["kernels"] = "another"
    stale["decode"]["device"] |= {"threads": 1}
    text = page({"cpu": stale})
    assert "`python -m qtuning_fast.bench.rows.growth` (2 threads); " in line(text, "**changed since: kernels**")
    assert "(1 thread); " in line(text, "rows.attention --decode`")
    assert line(text, "rows.attention`").count("have not changed since") == 1
    assert "- flex: `NotImplementedError: no backward`" in text
    for question in ("attention", "decode", "ingredients", "growth", "lifelong", "models"):
        assert f"](images/performance/cpu-{question}.png)" in text


def test_what_was_left_out_is_said(documents):
    documents["growth"]["errors"]["P"] = "left out: no time"
    assert "Not measured: P, left out: no time." in page({"cpu": documents})


def test_readme_s_figures_stand_between_its_marks(documents):
    readme = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    text = with_figures(readme, {"cpu": documents})
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert "eager PyTorch takes 3.00 to 3.0 times our time" in text and "takes 0.50 to 0.50 times our time" in text
    assert "docs/images/performance/cpu-attention.png" in text and "cpu-lifelong.png" in text
    assert with_figures(text, {"cpu": documents}) == text
    with pytest.raises(SystemExit, match="has no place for figures"):
        with_figures("nothing", {})


def test_a_run_writes_pages_and_pictures_and_a_check_finds_what_is_stale(documents, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(performance, "ROOT", tmp_path)
    folder = tmp_path / performance.RESULTS / "cpu"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name, each in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(each))
    (folder / "demo.json").write_text("{}")  # of another kind
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    (tmp_path / performance.PAGE).write_text("old")
    assert performance.main(["--check"]) == 1
    assert performance.PAGE in capsys.readouterr().out and (tmp_path / performance.PAGE).read_text() == "old"
    assert performance.main([]) == 0 and performance.main(["--check"]) == 0
    drawn = {path.name for path in (tmp_path / performance.IMAGES).iterdir()}
    assert drawn == {f"cpu-{q}.png" for q in documents if q not in ("mixed_tasks", "task_inference", "drop_in", "busy")}
    (tmp_path / performance.IMAGES / "cpu-growth.png").unlink()
    assert performance.main(["--check"]) == 1 and "cpu-growth.png" in capsys.readouterr().out


def test_what_is_committed_is_what_the_results_say():
    devices = read(performance.ROOT / performance.RESULTS)
    assert performance.main(["--check"]) == 0, "run `make report`"
    assert devices


def test_a_bound_is_a_bound():
    assert Target("", "cpu", "at most", 1.0, lambda d: 1.0).verdict({}) == "met"
    assert Target("", "cpu", "at most", 1.0, lambda d: 1.01).verdict({}) == "**not met**"
    assert Target("", "cpu", "at least", 1.0, lambda d: 0.99).verdict({}) == "**not met**"
    assert Target("", "cpu", "at least", 1.0, lambda d: None).verdict({}) == "not measured"
