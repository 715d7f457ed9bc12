"""The drawing of a plan: what its data say of every block, and what a browser makes of the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.bench.synthetic import DEEPSEEK_V3, LLAMA_405B, deepseek_tensors, llama_tensors
from tests.helpers.command import fails, llama, succeeds
from tests.report.test_capacity import model
from tpshard.formats.plan import plan_split
from tpshard.formats.split import Options
from tpshard.planning.model import Model
from tpshard.report.plan_page import _few, draw, page_data
from tpshard.report.results import PlanReport

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


def report(built: Model, tp: int) -> PlanReport:
    source = {"name": "m", "repo_id": None}
    files = {tensor.name: "f" for tensor in built.tensors}
    full = Model(built.tensors, built.axes, built.tied, files, source, built.architecture, config=built.config)
    return PlanReport(plan_split(full, Options(tp)), ())


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_a_row_for_each_kind_and_every_byte_is_drawn() -> None:
    plan = report(model("llama", {"model_type": "llama", **LLAMA_405B}, llama_tensors(LLAMA_405B)), 16)
    data = data_of(draw(plan))
    assert [section["layers"] and len(section["layers"]) for section in data["sections"]] == [None, 126, None, None]
    for rank in range(16):
        total = sum(
            data["kinds"][kind]["ranks"][rank][1] * len(section["layers"] or [0]) * len(experts or [0])
            for section in data["sections"]
            for _, kind, experts in section["rows"]
        )
        assert total == plan.rank_bytes[rank]


def test_replicas_and_padding_are_marked(tmp_path: Path) -> None:
    """2 KV heads on 4 ranks, and a vocab of 10 padded to 12: the last rank has 1 of 3 rows, 16 wide."""
    from tpshard.api import convert as api

    data = page_data(api.plan(llama(tmp_path / "m"), 4))
    rows = {name: data["kinds"][kind] for section in data["sections"] for name, kind, _ in section["rows"]}
    key = rows["model.layers.*.self_attn.k_proj.weight"]
    assert [rank[2] for rank in key["ranks"]] == [[("column", 0, 4 * 16, 2)]] * 4
    embedding = rows["model.embed_tokens.weight"]
    assert embedding["ranks"][0][2] == [("column", 0, 3 * 16, 1)]
    assert embedding["ranks"][3][2] == [("column", 0, 16, 1), ("padding", 0, 2 * 16, 1)]
    assert rows["model.norm.weight"]["ranks"][1][2] == [("replicate", 0, 16, 4)]
    assert rows["model.layers.*.mlp.down_proj.weight"]["rule"] == "row ffn"


def test_fused_segments_are_told_apart() -> None:
    """GPT-2's q, k, v one after another, GPT-NeoX's in turns, per head; many turns are drawn as their sums."""
    d, heads = 8, 4
    shapes = [("transformer.wte.weight", "F16", (6, d)), ("transformer.wpe.weight", "F16", (5, d))]
    for name, shape in {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, 4 * d),
                        "mlp.c_proj": (4 * d, d), "ln_1": (d,), "ln_2": (d,)}.items():  # fmt: skip
        shapes += [(f"transformer.h.0.{name}.{w}", "F16", s) for w, s in (("weight", shape), ("bias", shape[-1:]))]
    shapes += [("transformer.ln_f.weight", "F16", (d,)), ("transformer.ln_f.bias", "F16", (d,))]
    config = {"n_embd": d, "n_layer": 1, "n_head": heads, "vocab_size": 6, "model_type": "gpt2"}
    data = page_data(report(model("gpt2", config, shapes), 2))
    rows = {name: data["kinds"][kind] for section in data["sections"] for name, kind, _ in section["rows"]}
    fused = rows["transformer.h.*.attn.c_attn.weight"]
    assert fused["segments"] == ["heads"] * 3
    assert fused["ranks"][1][2] == [("column", index, 4 * d, 1) for index in range(3)]
    turns = [("column", index % 3, 5, 1) for index in range(90)]
    assert _few(turns) == [("column", index, 150, 1) for index in range(3)] and _few(turns[:6]) == turns[:6]


def test_experts_are_folded_and_the_page_stays_small() -> None:
    config = DEEPSEEK_V3 | {"num_hidden_layers": 5}
    page = draw(report(model("deepseek_v3", config | {"num_nextn_predict_layers": 0}, [
        shape for shape in deepseek_tensors(config) if ".layers.5." not in shape[0]
    ]), 8))  # fmt: skip
    layers = [section["layers"] for section in data_of(page)["sections"] if section["layers"]]
    assert layers == [[0, 1, 2], [3, 4]]
    experts = [row for section in data_of(page)["sections"] for row in section["rows"] if row[2]]
    assert {row[0] for row in experts} >= {"model.layers.*.mlp.experts.**.down_proj.weight"}
    assert all(row[2] == list(range(256)) for row in experts)
    assert len(page) < 100_000


def test_the_page_holds_nothing_but_itself() -> None:
    """Names come from files that others wrote: none ends the script, and nothing is fetched."""
    name = "</script><script>alert(1)</script>"
    built = model("llama", LLAMA_405B | {"num_hidden_layers": 1}, llama_tensors(LLAMA_405B | {"num_hidden_layers": 1}))
    plan = report(built, 2)
    plan.split.model.source["name"] = name  # type: ignore[index]
    page = draw(plan)
    assert "alert(1)" in page and page.count("</script>") == 2
    assert data_of(page)["title"] == f"{name} on 2 ranks"
    assert not re.search(r"https?://|src=|@import|url\(|innerHTML", page)


def test_report_is_written_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama(Path("m"))
    result = succeeds("plan", "m", "--tp", 2, "--report", "plan.html")
    assert "drawn in plan.html" in result.err and "m on 2 ranks" in Path("plan.html").read_text()
    fails(2, "plan", "m", "--tp", 2, "--report", "plan.pdf")
    fails(2, "plan", "m", "--tp", 2, "--report", "nowhere/plan.html")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_a_browser_draws_it(tmp_path: Path) -> None:
    """Rendered without errors: a block for every rank and row, as high as its bytes, and search and opening work."""
    page = tmp_path / "plan.html"
    config = {"model_type": "llama", **LLAMA_405B}
    text = draw(report(model("llama", config, llama_tensors(LLAMA_405B)), 8))
    probe = """<script>
    const at = (q) => [...document.querySelectorAll(q)], out = {};
    out.rows = at("#model > .row").length;
    out.blocks = at(".block").length;
    out.heights = Object.fromEntries(at("#model > .row").map((r) => [r.firstChild.title,
      r.querySelector(".block").getBoundingClientRect().height]));
    byId("search").value = "layers.17.self_attn.Q"; byId("search").dispatchEvent(new Event("input"));
    out.found = at("#found li").map((n) => n.textContent); out.hits = at(".label.hit").map((n) => n.title);
    byId("search").value = ""; byId("search").dispatchEvent(new Event("input"));
    at(".title button")[0].click(); out.layers = at(".title").length;
    at(".title button")[18].click(); out.opened = at(".label.inner").map((n) => n.title);
    at(".block")[0].click(); out.about = byId("about").textContent;
    at(".title button")[0].click(); out.closed = at("#model > .row").length;
    document.body.replaceChildren(JSON.stringify(out));
    </script></body>"""
    page.write_text(text.replace("</body>", probe))
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", "--window-size=400,800", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<body>(\{.*\})", done.stdout)
    assert found, done.stdout[-2000:]
    out = json.loads(found[1])
    assert (out["rows"], out["blocks"]) == (3 + 9, 8 * 12)
    layer = "model.layers.{0-125}."
    down, query = out["heights"][f"{layer}mlp.down_proj.weight"], out["heights"][f"{layer}self_attn.q_proj.weight"]
    assert down / query == pytest.approx(53248 / 16384, rel=0.01) and 0 < sum(out["heights"].values()) < 920
    assert out["found"] == ["model.layers.17.self_attn.q_proj.weight"] and out["hits"] == [
        f"{layer}self_attn.q_proj.weight"
    ]
    assert out["layers"] == 1 + 126
    assert len(out["opened"]) == 9 and out["opened"][0].startswith("model.layers.17.")
    assert "model.embed_tokens.weight · rank 0: [16032, 16384] · of [128256, 16384]" in out["about"]
    assert out["closed"] == 12
