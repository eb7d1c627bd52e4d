"""`gream index --update` on small tables: what the stages after it see, and what is refused."""

import json

import numpy as np
import pytest
from small_tables import interactions_table, items_table, write_tables

from cluster.pipeline import is_current, run_stages
from cluster.settings import load_settings
from curriculum.corpus import load_corpus
from item_index.input_error import InputError
from item_index.semantic_ids import SemanticIdIndex
from item_index.vectors import read_vectors

GONE, NEW = ("item-3", "item-20"), ("fresh-1", "fresh-2", "fresh-3")


def changed_tables():
    """Two items leave, three come; each of them has as many interactions as one that left or more."""
    items, interactions = items_table(), interactions_table()
    kept = [row for row, item_id in enumerate(items["item_id"]) if item_id not in GONE]
    items = {name: [column[row] for row in kept] for name, column in items.items()}
    items["item_id"] = [NEW[0], *items["item_id"], *NEW[1:]]
    items["title"] = ["Tale number 3", *items["title"], "An unheard of title", "Tale number 5 again"]
    items["categories"] = [["Drama"], *items["categories"], ["Horror"], ["Comedy"]]
    kept = [row for row, item_id in enumerate(interactions["item_id"]) if item_id not in GONE]
    interactions = {name: [column[row] for row in kept] for name, column in interactions.items()}
    for user in range(24):
        for place, item_id in enumerate(NEW):
            interactions["user_id"].append(user)
            interactions["item_id"].append(item_id)
            interactions["timestamp"].append(1000 + place)
    return items, interactions


def semantic_ids(index):
    rows = zip(index.item_ids, index.codes_IL.tolist(), index.lengths_I.tolist(), strict=True)
    return {item_id: tuple(codes[:length]) for item_id, codes, length in rows}


@pytest.fixture(params=[[], ["index.collaborative_weight=0.5"]], ids=["text", "text and interactions"])
def run(request, tmp_path):
    """Overrides of a run whose index was made, before the tables change."""
    overrides = [*write_tables(tmp_path / "data"), f"run_folder={tmp_path / 'run'}", *request.param]
    run_stages(load_settings(None, overrides), ["index"])
    return overrides


def change(tmp_path):
    items, interactions = changed_tables()
    write_tables(tmp_path / "data", items=items, interactions=interactions)


def test_a_changed_catalogue_keeps_its_semantic_ids(run, tmp_path, capsys):
    settings = load_settings(None, run)
    folder = tmp_path / "run" / "index"
    before = SemanticIdIndex.load(folder)
    codes_before = semantic_ids(before)
    vectors_before = dict(zip(*read_vectors(folder / "vectors.parquet"), strict=True))
    change(tmp_path)
    assert not is_current(settings, "index")
    run_stages(settings, ["index"], update_index=True)
    assert "3 items added, 0 returned, 2 retired; 22 keep" in " ".join(capsys.readouterr().out.split())
    after = SemanticIdIndex.load(folder)
    assert after.version != before.version
    assert after.item_ids == tuple(changed_tables()[0]["item_id"]), "rows follow the new catalogue"
    assert set(after.retired_ids) == set(GONE)
    now = semantic_ids(after)
    assert {item_id: now[item_id] for item_id in now if item_id in codes_before} == {
        item_id: codes for item_id, codes in codes_before.items() if item_id not in GONE
    }
    assert not set(codes_before[item_id] for item_id in GONE) & set(now.values())
    assert SemanticIdIndex.load(folder, version=before.version).item_ids == before.item_ids
    summary = json.loads((folder / "stage.json").read_text())["summary"]
    assert (summary["former_version"], summary["added"], summary["retired"]) == (before.version, 3, 2)

    # Newcomers went to the centroids nearest to the vectors that the saved encoder gives them.
    ids, vectors = read_vectors(folder / "vectors.parquet")
    assert tuple(ids) == (*after.item_ids, *after.retired_ids)
    for item_id, vector in zip(ids, vectors, strict=True):
        if item_id in vectors_before:
            np.testing.assert_array_equal(vector, vectors_before[item_id])
        else:
            residual, codes = vector.astype(np.float64), now[item_id]
            for level, codebook in enumerate(after.codebooks):
                assert codes[level] == np.square(residual - codebook).sum(axis=1).argmin()
                residual = residual - codebook[codes[level]]

    # The stages after it work on it as on any index; once more, nothing is left to do.
    run_stages(settings, ["corpus"])
    assert load_corpus(tmp_path / "run" / "corpus", folder).index.version == after.version
    run_stages(settings, ["index"], update_index=True)
    assert "index: unchanged, re-used" in capsys.readouterr().out

    # Items that come back have what they had.
    write_tables(tmp_path / "data")
    run_stages(settings, ["index"], update_index=True)
    assert "0 items added, 2 returned, 3 retired" in " ".join(capsys.readouterr().out.split())
    assert semantic_ids(SemanticIdIndex.load(folder)) == codes_before


@pytest.mark.engines
@pytest.mark.usefixtures("ray_cluster")
def test_an_update_by_ray_data_jobs_gives_the_same_index(tmp_path):
    written = []
    for distributed in ("false", "true"):
        data, run = tmp_path / f"data-{distributed}", f"run_folder={tmp_path / distributed}"
        overrides = [*write_tables(data), run, "index.collaborative_weight=0.5"]
        run_stages(load_settings(None, overrides), ["index"])
        items, interactions = changed_tables()
        write_tables(data, items=items, interactions=interactions)
        run_stages(load_settings(None, [*overrides, f"index.distributed={distributed}"]), ["index"], update_index=True)
        folder = tmp_path / distributed / "index"
        written.append((SemanticIdIndex.load(folder).version, *read_vectors(folder / "vectors.parquet")))
    assert written[0][:2] == written[1][:2]
    np.testing.assert_array_equal(written[0][2], written[1][2])


def test_an_update_needs_an_index_and_its_settings(run, tmp_path):
    change(tmp_path)
    other = load_settings(None, [*run, "index.level_sizes=[4,2,2]"])
    for _ in range(2):  # a refused update changes nothing that the next one looks at
        with pytest.raises(InputError, match=r"index.level_sizes is \[4, 2, 2\].*made with \[4, 3, 2\]"):
            run_stages(other, ["index"], update_index=True)
    write_tables(tmp_path / "data")
    assert is_current(load_settings(None, run), "index"), "what was refused leaves the index in use"
    change(tmp_path)
    nowhere = load_settings(None, [*run, f"run_folder={tmp_path / 'nowhere'}"])
    with pytest.raises(InputError, match="holds no index"):
        run_stages(nowhere, ["index"], update_index=True)
    run_stages(load_settings(None, [*run, "index.spare_collision_codes=9"]), ["index"], update_index=True)
