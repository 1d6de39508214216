"""The `ctxkv` command: parses, calls, prints. Heavy imports wait until a command needs them."""

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .config import PRESETS, RECIPES, ExperimentConfig, build_config, parse_settings
from .errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 for what the user can fix, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        options.command(options)
    except KeyboardInterrupt:
        return _fail(
            "Stopped. Finished stages and epochs are kept; the same command goes on from there.", 130
        )
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(_describe(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return _fail("The GPU is out of memory; lower phase2.batch_size, or use --set runtime.device=cpu.")
    return 0


def _fail(message: str, code: int = 2) -> int:
    print(f"ctxkv: {message}", file=sys.stderr)
    return code


def _describe(error: OSError) -> str:
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        return f"The disk is full ({error}); free some space and run again: finished stages are kept."
    return f"{error.strerror or error}: {error.filename}" if error.filename else str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ctxkv", description="Train and explore Context-KV attention.")
    parser.add_argument("--version", action="version", version=f"ctxkv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = _command(commands, "info", _info, "sizes and parameter counts, without downloading anything")
    _add_experiment(info)
    info.add_argument("--samples", type=int, metavar="N", help="training conversations")
    info.add_argument("--train-tokens", type=int, metavar="N", help="tokens of the training stream")
    info.add_argument("--val-tokens", type=int, metavar="N", help="tokens of the validation stream")
    info.add_argument("--json", action="store_true", help="print JSON")

    run = _command(commands, "run", _run, "one experiment; run again to continue or reuse it")
    _add_experiment(run)
    run.add_argument("--samples", type=int, metavar="N", help="training conversations")
    run.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/PRESET-RECIPE-N)")

    compare = _command(
        commands, "compare", _compare, "the same experiment on fewer and on more conversations"
    )
    _add_experiment(compare)
    compare.add_argument("--samples", type=int, nargs="+", metavar="N", help="sample counts, two or more")
    compare.add_argument("--out", type=Path, metavar="DIR", help="folder of the comparison and its runs")

    report = _command(commands, "report", _report, "the written report of one or more finished runs")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    report.add_argument("--lang", default="en", help="language: en or ja (default: en)")

    generate = _command(commands, "generate", _generate, "text from a trained run")
    generate.add_argument("run", type=Path, metavar="RUN", help="run folder")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="how the text begins")
    generate.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="(default: 100)")
    generate.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest (default: 0.8)"
    )
    generate.add_argument("--top-k", type=int, default=50, metavar="K", help="(default: 50)")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")

    evaluate = _command(commands, "evaluate", _evaluate, "perplexity and accuracy of a run on other text")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run folder")
    evaluate.add_argument("--data", type=Path, required=True, metavar="FILE", help=".jsonl or .jsonl.gz file")
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    probe = _command(
        commands, "probe", _probe, "what the contexts of a run remember, and what its slots miss"
    )
    probe.add_argument("run", type=Path, metavar="RUN", help="run folder")
    probe.add_argument("--lang", default="en", help="language: en or ja (default: en)")
    probe.add_argument("--json", action="store_true", help="print JSON")

    bench = _command(
        commands, "bench", _bench, "speed and memory against the original's loops and the hardware"
    )
    _add_experiment(bench)
    bench.add_argument("--samples", type=int, metavar="N", help="conversations of the stream")
    bench.add_argument("--rounds", type=int, default=10, metavar="N", help="timed repetitions (default: 10)")
    bench.add_argument("--out", type=Path, metavar="DIR", help="folder (default: runs/bench-PRESET-RECIPE-N)")
    bench.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _command(commands: Any, name: str, function: Any, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(command=function)
    return parser


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    presets = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    parser.add_argument("--preset", default="colab", metavar="P", help=f"{presets} (default: colab)")
    parser.add_argument("--recipe", metavar="R", help=f"{' or '.join(RECIPES)} (default: the preset's own)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="K=V", help="any setting, e.g. phase2.batch_size=256"
    )


def _config(options: argparse.Namespace, samples: int | None) -> ExperimentConfig:
    return build_config(options.preset, options.recipe, samples, parse_settings(options.set))


def _info(options: argparse.Namespace) -> None:
    from .report.info import describe, format_info

    facts = describe(_config(options, options.samples), options.train_tokens, options.val_tokens)
    print(json.dumps(facts, indent=2) if options.json else format_info(facts))


def _run(options: argparse.Namespace) -> None:
    config = _config(options, options.samples)
    from .runs.run_folder import run_folder_of

    out = options.out or run_folder_of(config)
    _announce(out)
    from .experiments.experiment import run

    finished = run(config, out, _print_epoch)
    best = finished.summary["phase2"]
    print(f"Best epoch {best['best_epoch']}: val PPL {best['val_ppl']:.1f}, val acc {best['val_acc']:.1%}")
    print(f"Report: {out / 'report.md'}")


def _compare(options: argparse.Namespace) -> None:
    counts = options.samples or PRESETS[_config(options, None).preset].samples
    configs = [_config(options, count) for count in counts]
    from .runs.run_folder import DEFAULT_ROOT, comparison_folder

    out = options.out or comparison_folder(configs)
    _announce(out)
    from .experiments.experiment import compare
    from .report import comparison_table

    runs = compare(configs, options.out or DEFAULT_ROOT, out, _print_epoch)
    print(comparison_table([finished.summary for finished in runs]))
    print(f"\nReport: {out / 'report.md'}\nFigures: {out / 'figures'}")


def _report(options: argparse.Namespace) -> None:
    from .report import write_report
    from .runs.run_folder import load_run

    print(write_report([load_run(path) for path in options.runs], options.lang))


def _generate(options: argparse.Namespace) -> None:
    from .runs.inference import generate_text, load_trained
    from .runs.provenance import choose_device

    model, tokenizer = load_trained(options.run, choose_device("auto"))
    sampling = (options.max_new_tokens, options.temperature, options.top_k, options.seed)
    print(generate_text(model, tokenizer, options.prompt, *sampling))


def _evaluate(options: argparse.Namespace) -> None:
    from .data.conversations import read_jsonl
    from .files import write_json
    from .runs.inference import evaluate_texts, format_scores, load_trained
    from .runs.provenance import choose_device
    from .views.figures import ppl_by_reading, save

    texts = read_jsonl(options.data).texts()
    model, tokenizer = load_trained(options.run, choose_device("auto"))
    scores = evaluate_texts(model, tokenizer, texts)
    out = options.run / "evaluation" / options.data.name.partition(".")[0]
    write_json(out.with_suffix(".json"), scores)
    save(ppl_by_reading(scores), out.with_suffix(".png"))
    print(json.dumps(scores, indent=2) if options.json else format_scores(scores))
    if not options.json:
        print(f"\nWritten: {out.with_suffix('.json')}, {out.with_suffix('.png')}")


def _probe(options: argparse.Namespace) -> None:
    from .experiments.probe import probe_run
    from .report.measured import probe_blocks, probe_rows
    from .report.tables import speaker, terminal_table
    from .runs.run_folder import load_run

    run, say = load_run(options.run), speaker(options.lang)
    found, written = probe_run(run)
    rows = probe_rows(probe_blocks(found, say), run.config.model.interval, say)
    print(json.dumps(found, indent=2) if options.json else terminal_table(rows))
    if not options.json:
        print(f"\nWritten: {', '.join(map(str, written))}")


def _bench(options: argparse.Namespace) -> None:
    config = _config(options, options.samples)
    from .runs.run_folder import run_folder_of

    run_folder = run_folder_of(config)
    out = options.out or run_folder.with_name(f"bench-{run_folder.name}")
    _announce(out)
    from .bench import bench, bench_table

    results = bench(config, run_folder, out, options.rounds)
    print(json.dumps(results, indent=2) if options.json else bench_table(results))
    if not options.json:
        print(f"\nWritten: {out / 'bench.json'}, {out / 'bench.png'}")


def _announce(out: Path) -> None:
    """On a terminal, a first line at once: imports and the token table take some seconds."""
    if sys.stderr.isatty():
        print(f"Working in {out}. Ctrl-C stops; the same command goes on.", file=sys.stderr)


def _print_epoch(metric: dict[str, Any]) -> None:
    """On a terminal, a line for each epoch above the progress bar."""
    if metric["stage"] == "phase2" and sys.stderr.isatty():
        from tqdm import tqdm

        run = f"{metric['samples']} samples, " if "samples" in metric else ""
        tqdm.write(
            f"{run}epoch {metric['epoch']}: train PPL {metric['train_ppl']:.1f}, "
            f"val PPL {metric['val_ppl']:.1f}, val acc {metric['val_acc']:.1%}"
            f"{' *' if metric['improved'] else ''}",
            file=sys.stderr,
        )
