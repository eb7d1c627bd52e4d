"""The command line: `gream data | index | corpus | sft | train | evaluate | run | report | serve | plan | status |
track`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cluster.progress import console
from cluster.settings import load_settings
from cluster.stopping import StopRequested, stopping_by_signals
from item_index.input_error import InputError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Post-train a generative reasoning recommender (GREAM) on Ray, vLLM, DeepSpeed and MLflow.",
)  # fmt: skip
data = typer.Typer(no_args_is_help=True, help="Make items.parquet and interactions.parquet.")
app.add_typer(data, name="data")
rollouts = typer.Typer(no_args_is_help=True, help="Look at rollouts that the train stage kept.")
app.add_typer(rollouts, name="rollouts")

Config = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; defaults without one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the settings in full and stop.")]


@data.command("ml-100k")
def ml_100k(
    output: Annotated[Path, typer.Option(help="Folder for the two Parquet files.")] = Path("data/ml-100k"),
) -> None:
    """MovieLens 100K, from the installed recbole package."""
    from curriculum.movielens import TERMS_OF_USE, convert_movielens_100k

    console.print(TERMS_OF_USE, highlight=False)
    items, interactions = convert_movielens_100k(output)
    console.print(f"data: {items} items and {interactions} interactions written to {output}")


@rollouts.command("show")
def show_rollouts(
    file: Annotated[Path, typer.Argument(help="A file of rollouts/ in the run folder.")],
    config: Config = None,
    groups: Annotated[int, typer.Option(min=1, help="Groups to show.")] = 4,
    responses: Annotated[int, typer.Option(min=2, help="Best and worst responses of a group to show.")] = 6,
) -> None:
    """Print groups with titles, rewards and advantages."""
    from cluster.rollout_report import rollout_report
    from curriculum.corpus import load_corpus

    folder = load_settings(config, ()).folder
    corpus = load_corpus(folder / "corpus", folder / "index")
    print(rollout_report(file, corpus, groups=groups, responses=responses))


def _amazon_command(year: int) -> None:
    folder = Path(f"data/amazon-{year}")

    @data.command(f"amazon-{year}", help=f"Amazon reviews of {year}, from files that you have downloaded.")
    def command(
        reviews: Annotated[Path, typer.Option(help="Review file: JSON lines, gzipped or not.")],
        metadata: Annotated[Path, typer.Option(help="Metadata file of the same category, gzipped or not.")],
        output: Annotated[Path, typer.Option(help="Folder for the two Parquet files.")] = folder,
        reviews_per_item: Annotated[
            int, typer.Option(help="Texts kept of an item: its earliest, of 20 characters or more, one of a user.")
        ] = 32,
        minimum_rating: Annotated[
            float | None, typer.Option(help="Drop reviews with fewer stars; without it all count.")
        ] = None,
    ) -> None:
        from curriculum.amazon import convert_amazon

        counts = convert_amazon(
            year, reviews=reviews, metadata=metadata, output=output, reviews_per_item=reviews_per_item,
            minimum_rating=minimum_rating,
        )  # fmt: skip
        for line in counts.lines():
            console.print(f"data: {line}", highlight=False)
        console.print(f"data: written to {output}", highlight=False)


for _year in (2014, 2018, 2023):
    _amazon_command(_year)


def _stage_command(name: str, help_text: str) -> None:
    @app.command(name, help=help_text)
    def command(config: Config = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
        _run([name], config, overrides, dry_run)


@app.command("index")
def index(
    config: Config = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    update: Annotated[
        bool,
        typer.Option("--update", help="Grow the index to a changed catalogue: every item keeps its semantic ID."),
    ] = False,
) -> None:
    """Give every item a semantic ID."""
    _run(["index"], config, overrides, dry_run, update_index=update)


_stage_command("corpus", "Split the interactions and write rows, prompts and the tokenizer.")
_stage_command("sft", "Supervised training on next items and reasoning.")


@app.command("train")
def train(
    config: Config = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    replay: Annotated[
        Path | None,
        typer.Option(help="Train on the groups of this file or folder (see train.dump_rollouts), without an engine."),
    ] = None,
) -> None:
    """Post-train by SRPO."""
    if replay is None or dry_run:
        _run(["train"], config, overrides, dry_run)
        return
    from cluster.pipeline import replay_rollouts

    with _ending_by_signals():
        replay_rollouts(load_settings(config, overrides or ()), replay)


_stage_command("sft_continued", "Go on with supervised training as long as SRPO took, to compare with.")
_stage_command("evaluate", "Evaluate both modes beside the baselines.")


@app.command("run")
def run(config: Config = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """All stages, each only where its inputs have changed."""
    _run(None, config, overrides, dry_run)


@app.command("track")
def track(
    run_folder: Annotated[Path, typer.Argument(help="The run folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Another tracking.uri, for example.")
    ] = None,
) -> None:
    """Send to MLflow what earlier commands could not."""
    from cluster.journal import SETTINGS_FILE
    from cluster.tracking import TRACKING_FOLDER, send_left_overs

    settings = load_settings(
        run_folder / TRACKING_FOLDER / SETTINGS_FILE, [*(overrides or ()), f"run_folder={run_folder}"]
    )
    left = send_left_overs(settings)
    if left:
        raise InputError(f"{left} records could not be sent", file=run_folder, remedy="Look at the warnings above.")
    console.print("track: MLflow has everything", highlight=False)


@app.command("serve")
def serve(
    run: Annotated[Path, typer.Option("--run", help="Run folder whose checkpoint is served.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
    wait: Annotated[bool, typer.Option(help="Serve until Ctrl-C; without it leave the service to the cluster.")] = True,
) -> None:
    """Serve both modes over HTTP, with a page to look at."""
    from cluster.serving import serve_run, served_settings

    if dry_run:
        print(served_settings(str(run), overrides or ()).dump(), end="")
    else:
        serve_run(str(run), overrides or (), wait=wait)


@app.command("status")
def status(run_folder: Annotated[Path, typer.Argument(help="The run folder.")]) -> None:
    """Show how far a run is, from what its driver has written; asks neither Ray nor MLflow."""
    from cluster.run_status import show_status

    show_status(run_folder)


@app.command("report")
def report(
    run_folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders that were evaluated.")],
    output: Annotated[Path, typer.Option(help="Folder for report.md and report.html.")] = Path("report"),
) -> None:
    """One report on evaluated runs; those that differ in their seed alone count as one variant."""
    from cluster.run_report import write_report

    for file in write_report(run_folders, output):
        console.print(f"report: {file}", highlight=False)


@app.command("plan")
def plan(config: Config = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Show who would run where and how much memory it takes, on settings.machine; starts nothing."""
    settings = load_settings(config, overrides or ())
    if dry_run:
        print(settings.dump(), end="")
        return
    from cluster.plan import show_plan

    show_plan(settings)


def _run(
    names: list[str] | None, config: Path | None, overrides: list[str] | None, dry_run: bool, *,
    update_index: bool = False,
) -> None:  # fmt: skip
    """These stages; all that the settings have for None."""
    settings = load_settings(config, overrides or ())
    if dry_run:
        print(settings.dump(), end="")
        return
    from cluster.pipeline import run_stages, stages_of
    from cluster.tracking import tracking_uri

    with _ending_by_signals():
        run_stages(settings, names or stages_of(settings), update_index=update_index)
    uri = tracking_uri(settings)
    if settings.tracking.uri is None:
        uri = f"sqlite:///{settings.run_folder}/mlflow.db"
    console.print(f"Open the metrics with: mlflow ui --backend-store-uri {uri}", highlight=False)


@contextmanager
def _ending_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process with the exit status that shells expect, after what is open was closed."""
    try:
        with stopping_by_signals():
            yield
    except StopRequested as stop:
        print(f"gream: {stop}", file=sys.stderr)
        raise SystemExit(128 + stop.number) from None


def main() -> None:
    """Entry point: bad input ends with one message and exit status 2."""
    try:
        app()
    except InputError as error:
        print(f"gream: {error}", file=sys.stderr)
        raise SystemExit(2) from None
