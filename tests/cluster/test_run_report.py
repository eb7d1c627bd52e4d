"""The report on evaluated runs: variants and their seeds, users compared, one HTML file that needs no other."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.journal import Journal
from cluster.run_report import EvaluatedRun, user_measures, variants_of, write_report
from cluster.settings import load_settings
from cluster.tracking import TRACKING_FOLDER
from evaluation.results import write_rankings
from item_index.input_error import InputError

USERS = 40
SYSTEMS = ("item_knn", "direct_sft", "direct_srpo")


@pytest.fixture
def evaluated(tmp_path):
    """Writes a run folder in which the targets of `share` of the users stand first in srpo's lists."""

    def write(name, *, seed, share, **settings):
        folder = tmp_path / name
        (folder / "evaluation").mkdir(parents=True)
        overrides = [f"run_folder={folder}", f"seed={seed}", *(f"{key}={value}" for key, value in settings.items())]
        (folder / "settings.yaml").write_text(load_settings(None, overrides).dump())
        metrics = {system: {"recall@10": 0.5, "ndcg@10": 0.25} for system in SYSTEMS}
        metrics["direct_srpo"]["ndcg@10"] = share
        (folder / "evaluation" / "results.json").write_text(json.dumps(metrics))
        (folder / "evaluation" / "examples.md").write_text(
            "- a chain: <script>alert(1)</script> of *seed* " + str(seed)
        )
        lists = {system: np.tile([1, 0], (USERS, 1)) for system in SYSTEMS}  # the target, item 0, stands second
        lists["direct_srpo"][: int(share * USERS)] = [0, 1]
        users = [f"user {number}" for number in range(USERS)]
        write_rankings(
            folder / "evaluation" / "rankings.parquet", lists, np.zeros(USERS, dtype=np.int64), users, ["a", "b"]
        )
        (folder / TRACKING_FOLDER).mkdir()
        journal = Journal(folder / TRACKING_FOLDER)
        for step, reward in enumerate((0.1, 0.2)):
            journal.append("metrics", run="train/1", step=step, values={"train/reward": reward})
        journal.append("metrics", run="train/2", step=0, values={"train/reward": 0.3})
        journal.close()
        return folder

    return write


def test_runs_that_differ_in_seed_and_machine_alone_are_one_variant(evaluated):
    runs = [
        EvaluatedRun.load(folder)
        for folder in (
            evaluated("a", seed=0, share=0.5),
            evaluated("b", seed=1, share=0.25, **{"cluster.threads": 1}),
            evaluated("c", seed=0, share=0.5, **{"train.advantages": "group_relative"}),
        )
    ]
    variants = variants_of(runs)
    assert {name: [run.folder.name for run in members] for name, members in variants.items()} == {
        "train.advantages=bonus_calibrated": ["a", "b"], "train.advantages=group_relative": ["c"]
    }  # fmt: skip
    assert list(variants_of(runs[:2])) == ["all runs"]
    assert runs[0].history["train/reward"] == [(0, 0.3), (1, 0.2)]  # of a step that was tracked again, the latest

    measures = user_measures(variants["train.advantages=bonus_calibrated"])
    second = 1 / np.log2(3)
    np.testing.assert_allclose(measures["item_knn"]["ndcg@10"], second)
    means = np.sort(measures["direct_srpo"]["ndcg@10"])[::-1]
    np.testing.assert_allclose(means, [*[1.0] * 10, *[(1 + second) / 2] * 10, *[second] * 20])


def test_the_report_is_one_file_that_needs_no_other_and_trusts_no_title(evaluated, tmp_path):
    folders = [evaluated("a", seed=0, share=0.5), evaluated("b", seed=1, share=0.25)]
    markdown, html = (file.read_text() for file in write_report(folders, tmp_path / "report"))
    assert "| direct_srpo | 0.5000 ± 0.0000 | 0.3750 ± 0.1768 |" in markdown
    assert re.search(r"\| ndcg@10 \| direct_srpo \| direct_sft \| \*\*\+0\.1384\*\* \|", markdown)
    assert "| direct_srpo | item_knn |" in markdown
    assert (tmp_path / "report" / "figures" / "1-reward.png").read_bytes().startswith(b"\x89PNG")
    assert "![1-reward](figures/1-reward.png)" in markdown

    sources = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "<td>direct_srpo</td>" in html.replace(' style="text-align:left"', "")


def test_variants_are_compared_with_the_first(evaluated, tmp_path):
    folders = [
        evaluated("a", seed=0, share=0.5),
        evaluated("b", seed=0, share=1.0, **{"train.advantages": "group_relative"}),
    ]
    write_report(folders, tmp_path / "report")
    part = (tmp_path / "report" / "report.md").read_text().partition(", against ")[2]
    better, same = (
        f"direct_{stage}, train.advantages=group_relative | direct_{stage}, train.advantages=bonus_calibrated | {rest}"
        for stage, rest in (("srpo", r"\*\*\+0\.18"), ("sft", r"\+0\.0000 "))
    )
    assert re.search(better.replace(" | ", r" \| "), part)
    assert re.search(same.replace(" | ", r" \| "), part)


def test_a_run_without_rankings_is_named(evaluated, tmp_path):
    folder = evaluated("a", seed=0, share=0.5)
    result = CliRunner().invoke(app, ["report", str(folder), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert (tmp_path / "out" / "report.html").is_file()
    (folder / "evaluation" / "rankings.parquet").unlink()
    with pytest.raises(InputError, match="there are no rankings"):
        write_report([folder], tmp_path / "out")
