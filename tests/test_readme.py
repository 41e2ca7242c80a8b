"""The README is true: its map, its commands, its switches, its numbers.

Run:  python -m pytest tests/test_readme.py
"""
import argparse
import ast
import functools
import importlib
import itertools
import json
import re
import shlex

import pytest

import claims
import decoder
import evaluate
from conftest import ROOT, run_script, shown_accuracy
from datasets import DATA

FILES = "vit hog pretrain decoder pll datasets train evaluate".split()
TEXT = (ROOT / "README.md").read_text()
MORE = {name: (ROOT / f"tests/results/{name}.md").read_text() for name in ("toy", "ferplus")}
REFERENCE = r"Eq\. \(\d\)|Sec\. \d(?:\.\d)*|Fig\. \d|Algorithm 1, lines? \d(?:, \d)*|Table \d"


def references(text):
    """What of the paper a text names, single: "Algorithm 1, lines 7, 8" are two."""
    found = set()
    for name in re.findall(REFERENCE, text):
        if name.startswith("Algorithm"):
            found |= {f"Algorithm 1, line {n}" for n in re.findall(r"\d", name[11:])}
        else:
            found.add(name)
    return found


def sources():
    """{"pll.py:pll_loss": its source} of every function, class and table of settings; a picture of
    an equation is no part of the equation's code."""
    found = {}
    for file in FILES:
        code = (ROOT / f"{file}.py").read_text()
        lines = code.splitlines()
        for node in ast.parse(code).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").isupper():
                begin = node.lineno - 1                  # with the comment above it
                while lines[begin - 1].startswith("#"):
                    begin -= 1
                found[f"{file}.py:{node.targets[0].id}"] = "\n".join(lines[begin:node.end_lineno])
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[f"{file}.py:{node.name}"] = "\n".join(lines[node.lineno - 1:node.end_lineno])
    return found


def tags(source):
    """References in the docstring's first sentence or in a comment at the end of a line."""
    first = re.search(r'"""(.*?)((?<!Eq)(?<!Sec)(?<!Fig)(?<!al)\.\s|\.?""")', source, re.DOTALL)
    comments = re.findall(r"  # (.*)$", source, re.MULTILINE)
    return references(" ".join([first.group(1).replace("\n", " ") if first else "", *comments]))


def test_tags_are_found_in_first_sentences_and_at_the_ends_of_lines():
    code = '''
def revised(c):
    """What Eq. (5) leaves (Sec. 3.3.2, Fig. 2; Wang et al. 2020). Not of Eq. (1)."""
    c = c / c.sum()                                     # Eq. (4), Algorithm 1, lines 6, 7
'''
    assert tags(code) == {"Eq. (4)", "Eq. (5)", "Sec. 3.3.2", "Fig. 2", "Algorithm 1, line 6",
                          "Algorithm 1, line 7"}


def the_map():
    """Rows of the table: (references, places in the code, tests)."""
    part = TEXT.split("## How the paper becomes code")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in part.splitlines()
            if line.startswith("| ")]
    return [(references(row[0]), re.findall(r"`(\w+\.py:\w+)`", row[2]),
             re.findall(r"`(test_\w+\.py::\w+)`", row[3])) for row in rows
            if not set(row[0]) <= set(" -") and "paper" != row[0].strip()]


def test_every_row_of_the_map_names_code_that_says_so_and_a_test_that_exists():
    code, rows = sources(), the_map()
    assert len(rows) >= 15
    for named, places, tests in rows:
        assert named and places and tests, (named, places, tests)
        for place in places:
            assert place in code, place
            missing = named - references(code[place])
            assert not missing, f"{place} does not say {missing}"
        for test in tests:
            file, name = test.split("::")
            assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)


def test_whatever_the_code_tags_stands_in_the_map():
    listed = {}
    for named, places, _ in the_map():
        for place in places:
            listed.setdefault(place, set()).update(named)
    for place, source in sources().items():
        missing = tags(source) - listed.get(place, set())
        assert not missing, f"{place} is tagged {missing}, the README's map does not say so"


def test_the_whole_paper_is_in_the_map():
    named = set().union(*(row[0] for row in the_map()))
    wanted = {f"Eq. ({n})" for n in range(1, 6)} | {f"Algorithm 1, line {n}" for n in range(1, 10)}
    wanted |= {f"Table {n}" for n in range(1, 5)} | {"Fig. 2", "Fig. 3", "Fig. 4", "Sec. 3.1",
                                                     "Sec. 3.2", "Sec. 3.3", "Sec. 3.3.1",
                                                     "Sec. 3.3.2", "Sec. 4.1", "Sec. 4.2"}
    assert wanted <= named, wanted - named


def commands():
    """Every command of the README, toy.md and ferplus.md that runs a file of ours: (file, list of
    arguments); those of a loop once for each of its values."""
    text = "\n".join([TEXT, *MORE.values()])
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`((?:python|torchrun) [^`]*)`", re.sub(r"```.*?```", "", text,
                                                                flags=re.DOTALL))
    found = []
    for block in blocks + inline:
        values = {}                                      # of the loops so far, the inner ones last
        for command in re.split(r"\n|&&|;", block.replace("\\\n", " ")):
            loop = re.search(r"for (\w) in (.*)", command)
            if loop:
                values[f"${loop[1]}"] = loop[2].split()
            match = re.search(r"(?:python|torchrun[^.]*?) (?:\.\./\.\./|tests/)?(\w+)\.py(.*)",
                              command)
            if not match or "..." in match[0] or match[1] == "claims":
                continue
            loops = [name for name in values if name in match[2]]
            for chosen in itertools.product(*(values[name] for name in loops)):
                words = functools.reduce(lambda s, pair: s.replace(*pair), zip(loops, chosen),
                                         match[2].rstrip(")"))
                assert "$" not in words, command
                found.append((match[1], ["toy" if word == "D" else word
                                         for word in shlex.split(words)]))
    return found


class Parsed(Exception):
    """The command line was read without an error."""


def parse_alone(monkeypatch):
    """Let every script stop once its real parser has read the command line."""
    parse, seen = argparse.ArgumentParser.parse_args, []

    def stop(self, args=None, namespace=None):
        seen.append(self)
        parse(self, args, namespace)
        raise Parsed
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    return seen


def test_every_command_of_the_readme_is_read_by_the_real_parsers(monkeypatch):
    """Those of both stages up to where a run starts, so that no setting of theirs is refused."""
    def stop(config):
        raise Parsed

    found = commands()
    assert {file for file, _ in found} == set(FILES) - {"vit"} | {"benchmark"}
    assert len(found) > 200
    for stage in ("pretrain", "train"):
        monkeypatch.setattr(importlib.import_module(stage), "start", stop)
        for arguments in (words for file, words in found if file == stage and "own" not in words):
            with pytest.raises(Parsed):
                importlib.import_module(stage).main(arguments)
    parse_alone(monkeypatch)
    for file, arguments in found:
        with pytest.raises(Parsed):
            importlib.import_module(file).main(arguments)


def test_every_switch_of_the_readme_exists(monkeypatch):
    parsers = parse_alone(monkeypatch)
    for file in ("hog", "decoder", "pll", "datasets", "pretrain", "train", "evaluate", "benchmark"):
        with pytest.raises(Parsed):
            importlib.import_module(file).main([])
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    others = {"--nproc_per_node", "--max-restarts", "--exercises", "--ipc"}    # of torchrun, pytest
    for switch in re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT + "".join(MORE.values())):
        assert switch in known | others, switch


def test_every_file_and_test_that_the_readme_names_exists():
    for name in re.findall(r"`(tests/\w+\.py|\w+\.py)`", TEXT):
        assert (ROOT / name).is_file() or (ROOT / "tests" / name).is_file(), name
    for name in re.findall(r"`(test_\w+)`", TEXT):
        assert any(f"def {name}(" in p.read_text() for p in (ROOT / "tests").glob("*.py")), name
    for picture in re.findall(r"\.github/[\w-]+\.png", TEXT):
        assert (ROOT / picture).is_file(), picture


def test_the_readme_does_not_grow():
    """What is longer than this is not read; a new row takes the place of another line."""
    assert len(TEXT.splitlines()) <= 455


def test_the_cost_table_is_what_decoder_py_prints():
    for line in decoder.cost_table(12_271):
        assert line in TEXT


KEPT = {"ferplus-15-epochs": TEXT + MORE["ferplus"], "ferplus-4-epochs": MORE["ferplus"],
        "ferplus-other-lengths": MORE["ferplus"]}        # kept runs: the pages with their tables
MEAN = r"\d+\.\d ± \d+\.\d(?!\d)"
DIFFERENCE = r"[+-]\d+\.\d \([+-]\d+\.\d\)"
OF_THE_TOY = "[Tt]oy: [^;|]*"                            # in a cell that also speaks of FERPlus


def of_the_toy():
    """What the README's results say of it."""
    return TEXT.split("### The toy")[1].split("\n## ")[0]


def printed(capsys, name, *flags):
    """The table of the kept runs in tests/results/NAME, a line each."""
    folders = sorted(map(str, (ROOT / "tests/results" / name).iterdir()))
    evaluate.main([*folders, *flags, "--markdown"])
    return capsys.readouterr().out.splitlines()


def test_the_tables_of_kept_runs_are_what_evaluate_py_prints_of_them(capsys):
    """Every line stands in the README (accuracy in 15 epochs) or in ferplus.md. No mean with a
    deviation and no accuracy in bold stands in the results or beside a switch that is not in such a
    row."""
    rows = []
    for name, page in KEPT.items():
        lines = printed(capsys, name, "--split", "val")
        for line in lines:
            assert line in page, line
        rows += lines
    assert len(rows) > 40
    told = TEXT.split("## Results")[1].split("## What the logs say")[0]
    told = MORE["ferplus"] + told.replace(of_the_toy(), "")
    told = re.sub(OF_THE_TOY, "", told)                                # these are the next test's
    bold = re.findall(r"\*\*(\d+\.\d)%", told)
    assert bold
    for mean in re.findall(MEAN, told) + bold:                       # the text's and the tables'
        assert any(f"| {mean} |" in row for row in rows), mean


def test_the_tables_of_the_toy_are_what_evaluate_py_prints_of_its_kept_runs(capsys):
    """Every line stands in toy.md; a mean with a deviation, there and in what the README says of
    the toy, in such a line."""
    rows, told = printed(capsys, "toy"), MORE["toy"]
    assert len(rows) > 25
    for line in rows:
        assert line in told, line
    told += of_the_toy() + " ".join(re.findall(OF_THE_TOY, TEXT))
    for mean in re.findall(MEAN, told):
        assert any(f"| {mean} |" in row for row in rows), mean


def test_the_tables_of_claims_are_what_claims_py_prints():
    """Row for row: most rows have their meaning from those above. Without a figure, a row would be
    of a misspelt run. A difference that the README tells stands in one of the tables."""
    printed = run_script("tests/claims.py").stdout.rstrip("\n").split("\n\n")
    assert len(printed) == 2
    both = ((claims.THE_PAPERS, TEXT), (claims.FURTHER, MORE["ferplus"]))
    for table, (rows, page) in zip(printed, both):
        assert "\n\n" + table + "\n" in page
        lines = table.splitlines()[2:]
        assert len(lines) == len(rows)
        for line in lines:
            assert re.search(r"\d \([+-]\d", line), line
    told = re.findall(DIFFERENCE, re.sub(r"(?m)^\|.*", "", TEXT))
    assert len(told) > 9
    for difference in told:
        assert re.search(r"[ *]" + re.escape(difference) + r"['* ]", "\n".join(printed)), difference


def test_the_command_of_each_kept_run_gives_its_settings_still(monkeypatch):
    """Presets, methods or defaults that have changed since would make the results another code's.
    Settings that are newer than a run are at their defaults, as they cannot have been given."""
    def stop(config):
        raise Parsed(config)

    kept = sorted((ROOT / "tests/results").rglob("config.json"))
    assert len(kept) > 150
    for path in kept:
        then = json.loads(path.read_text())
        script = importlib.import_module(then["stage"])
        monkeypatch.setattr(script, "start", stop)
        with pytest.raises(Parsed) as now:
            script.main(shlex.split(then["command"])[1:])
        settings = now.value.args[0]
        for name in then.keys() - set(evaluate.ABOUT) - {"device"}:
            assert settings[name] == then[name], (path, name)


def keep(path, accuracy, held_out=None):
    """What a claim needs of the result that evaluate.py leaves; in per cent."""
    path.parent.mkdir(parents=True)
    result = {"accuracy": accuracy / 100}
    if held_out is not None:
        result["held_out_accuracy"] = held_out / 100
    path.write_text(json.dumps(result))


OTHER = (10, 70, 40)                                     # per cent of seeds 0, 1, 2


@pytest.mark.parametrize("more, said", [
    ([(2, 1), (4, 1)], "**+3.0 (+1.0)**"),               # one sign everywhere
    ([(-2, -1), (-4, -3)], "**-3.0 (-2.0)**"),
    ([(2, 5), (4, -1)], "+3.0 (+2.0)"),                  # behind on one seed's held-out faces
    ([(6, 5), (-4, 1)], "+1.0 (+3.0)"),                  # behind in one seed
    ([(2, 0), (4, 2)], "+3.0 (+1.0)"),                   # even is neither ahead
    ([(-2, 0), (-4, -2)], "-3.0 (-1.0)"),                # nor behind
    ([(2, 1)], "+2.0 (+1.0)'"),                          # one seed says nothing of spread
    ([], "")])
def test_a_claim_is_in_bold_only_if_each_of_two_seeds_says_it(tmp_path, monkeypatch, more, said):
    """What seeds 1 and 2 of one row have more than the other's: (points of accuracy, on held-out
    faces). Of that other row there is a seed 0, too, which has nothing to be compared with."""
    for seed, value in enumerate(OTHER):
        keep(tmp_path / f"f/other-{seed}/val.json", value, value)
    for seed, (points, held_out) in enumerate(more, start=1):
        keep(tmp_path / f"f/one-{seed}/val.json", OTHER[seed] + points, OTHER[seed] + held_out)
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert claims.cell("f/one", "f/other") == said


@pytest.mark.parametrize("values, said", [((72, 74), "**+3.0 (+2.0 to +4.0)**"),
                                          ((69, 74), "+1.5 (-1.0 to +4.0)"),
                                          ((72,), "+2.0 (+2.0 to +2.0)'")])
def test_the_toys_claims_have_a_range_for_want_of_held_out_faces(tmp_path, monkeypatch, values,
                                                                  said):
    for name, accuracies in (("one", values), ("other", (70, 70))):
        for seed, value in enumerate(accuracies):
            keep(tmp_path / f"toy/{name}-{seed}/test.json", value)
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert claims.cell("toy/one", "toy/other") == said


def test_the_papers_column_is_the_difference_of_its_own_figures():
    """FERPlus's where it has both (Tables 1, 2), else RAF-DB's (Tables 3, 4), else nothing."""
    assert claims.in_the_paper("ours", "baseline") == "+2.93"        # 91.11 - 88.18
    assert claims.in_the_paper("decoder", "mim-hog-pll") == "+0.94"  # 91.29 - 90.35
    assert claims.in_the_paper("ours", claims.LONG_BASELINE) == "+2.93"


def test_a_row_of_claims_has_the_columns_of_its_runs():
    """A dict names the other run of each column that it has."""
    assert claims.cells("ours", {"toy": "toy/baseline"})[1:] == ["", ""]
    assert claims.cells("soft", {"toy": "toy/baseline"}) == [claims.cells("soft", "baseline")[0],
                                                             "", ""]
    toy, four, fifteen = claims.cells("ours", claims.LONG_BASELINE)
    assert toy == claims.cells("ours", "baseline")[0]
    assert four == claims.cell("ferplus-4-epochs/ours", "ferplus-other-lengths/baseline")
    assert fifteen == claims.cell("ferplus-15-epochs/ours",
                                  "ferplus-other-lengths/baseline-42-epochs")


def test_a_setting_that_was_varied_alone_has_its_effect_beside_its_switch():
    """tests/results/ferplus-search/FLAG=VALUE: per cent of the held-out faces / of Valid."""
    part = TEXT.split("## What the paper leaves open")[1].split("\n## ")[0].splitlines()
    runs = sorted((ROOT / "tests/results/ferplus-search").iterdir())
    assert len(runs) > 5
    for run in runs:
        flag, value = run.name.replace("_", " ").split("=")
        result = json.loads((run / "val.json").read_text())
        held_out, accuracy = (f"{100 * result[key]:.1f}" for key in ("held_out_accuracy",
                                                                     "accuracy"))
        effect = f"{value}: {held_out} / {accuracy}"
        assert any(f"`--{flag}`" in line and effect in line for line in part), (flag, effect)


def test_the_benchmark_runs_in_small():
    """tests/benchmark.py is not collected; here every group of it is measured at a tiny size."""
    done = run_script("tests/benchmark.py", "--quick")
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) > 20 and all(len(row) == len(rows[0]) for row in rows)
    for what in ("ViT", "pre-training step", "HOG", "reading", "fine-tuning step", "evaluation",
                 "with --compile", "two processes", "C in a step", "laptop-scale training",
                 "two blocks"):
        assert any(what in row[0] for row in rows), what


def test_the_accuracy_that_the_readme_shows_is_what_the_first_command_reaches():
    kept = ROOT / "runs/train-toy/test.json"
    if not kept.is_file():
        pytest.skip("made by the README's first command, which was not run here")
    accuracy = json.loads(kept.read_text())["accuracy"]
    assert accuracy * 100 == pytest.approx(shown_accuracy() * 100, abs=4)


def test_the_first_commands_block_is_what_evaluate_prints_but_for_rounding():
    """Another processor's run of the same command is kept: its words, and numbers near them."""
    shown = re.search(r"(?m)^accuracy  .*(?:\n[^`\n]+)*", TEXT)[0]
    folder = ROOT / "tests/results/toy/ours-0"
    result, config = (json.loads((folder / f"{name}.json").read_text())
                      for name in ("test", "config"))
    printed = evaluate.as_text(result, DATA["toy"]["classes"], config["revise"])
    printed = re.search(r"(?m)^accuracy  .*(?:\n[^`\n]+)*", printed)[0]
    assert re.sub(r"\d", "0", shown) == re.sub(r"\d", "0", printed)
    assert [float(n) for n in re.findall(r"[\d.]+", shown)] == pytest.approx(
        [float(n) for n in re.findall(r"[\d.]+", printed)], abs=8)
