"""README.md, CHANGELOG.md, CONTRIBUTING.md and docs/ agree with the repository: links, paths, commands, names of ops; words, in docstrings too.

Each check is a function of a folder or a text, so that the tests below it can also show that it finds what is wrong.
"""

import ast
import collections
import csv
import functools
import inspect
import io
import json
import re
import tokenize
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import dspark_kernels as dk
from dspark_kernels import testing

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("dspark_kernels", "reference", "tests", "bench", "examples", "hub", "docs", ".ci")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
COMMENT = re.compile(r"<!--.*?-->", re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def documents(root):
    return [root / "README.md", root / "CHANGELOG.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]


def prose(text):
    """The text without fenced blocks and comments; lines keep their numbers."""
    for pattern in (FENCE, COMMENT):
        text = pattern.sub(lambda found: "\n" * found[0].count("\n"), text)
    return text


# --- links and paths --------------------------------------------------------------------------------------------------


def anchors(text):
    """Fragments of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(root):
    found = []
    for document in documents(root):
        for link in LINK.findall(prose(document.read_text(encoding="utf-8"))):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, fragment = link.partition("#")
            target = document.parent / path if path else document
            if not target.exists():
                found.append(f"{document.relative_to(root)}: {link}: no such file")
            elif fragment and fragment not in anchors(target.read_text(encoding="utf-8")):
                found.append(f"{document.relative_to(root)}: {link}: no such heading")
    return found


def paths_in(text):
    """Repository paths of inline code and of commands in fenced blocks; a star stands for any name."""
    code = re.findall(r"`([^`]+)`", prose(text)) + [block for _, block in FENCE.findall(text)]
    words = [word.strip(",:;()") for piece in code for word in piece.split()]
    inside = [word for word in words if word.split("/")[0] in FOLDERS and "/" in word and "<" not in word]
    return inside + [word for word in words if re.fullmatch(r"[\w-]+\.(md|toml|txt)", word)]


def modules_in(text):
    """What `python -m` starts."""
    return re.findall(r"python -m ((?:bench|dspark_kernels|reference)[\w.]*\w)", text)


def missing_paths(root):
    found = []
    for document in documents(root):
        text = document.read_text(encoding="utf-8")
        files = [(path, [path]) for path in paths_in(text)]
        for module in modules_in(text):
            path = module.replace(".", "/")
            files.append((f"python -m {module}", [f"{path}.py", f"{path}/__main__.py"]))
        for shown, choices in files:
            if not any(list(root.glob(choice)) for choice in choices):
                found.append(f"{document.relative_to(root)}: {shown}: not in the repository")
    return found


def test_links():
    assert broken_links(ROOT) == []


def test_paths_and_commands():
    assert missing_paths(ROOT) == []


PLANTED = {
    "see [trees](tree.md)": broken_links,
    "see [trees](trees.md#no-such-heading)": broken_links,
    "![picture](rounds.svg)": broken_links,
    "decided in `dspark_kernels/kernels/nowhere.py`": missing_paths,
    "all of `tests/nowhere_*.py`": missing_paths,
    "see `NOWHERE.md`": missing_paths,
    "run `python -m bench.nowhere`": missing_paths,
    "```bash\npython -m pytest tests/test_nowhere.py\n```": missing_paths,
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_broken_is_found(tmp_path, planted):
    for entry in ROOT.iterdir():
        if entry.name != "docs":
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "docs").mkdir()
    for entry in (ROOT / "docs").iterdir():
        (tmp_path / "docs" / entry.name).write_bytes(entry.read_bytes())
    assert broken_links(tmp_path) == missing_paths(tmp_path) == []
    page = tmp_path / "docs" / "engines.md"
    page.write_text(page.read_text(encoding="utf-8") + f"\n{planted}\n", encoding="utf-8")
    for check in (broken_links, missing_paths):
        assert len(check(tmp_path)) == (check is PLANTED[planted])


# --- pages ------------------------------------------------------------------------------------------------------------


def test_python_blocks_compile():
    blocks = 0
    for document in documents(ROOT):
        for language, block in FENCE.findall(document.read_text(encoding="utf-8")):
            if language == "python":
                compile(block, str(document), "exec")
                blocks += 1
    assert blocks, "the round of the README at least"


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_every_page_begins_with_its_question_and_is_in_the_index():
    index = LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    for page in (ROOT / "docs").glob("*.md"):
        title, question = page.read_text(encoding="utf-8").split("\n\n")[:2]
        assert title.startswith("# ") and question.endswith("?"), page.name
        assert page.name in index or page.name == "README.md"


def test_every_page_is_in_the_site():
    """Once in mkdocs.yml; docs/README.md is pages.md there (docs/hooks.py)."""
    listed = re.findall(r"^ +- (?:\w+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == {name for name in listed if "/" not in name} - {
        "pages.md", "CONTRIBUTING.md", "CHANGELOG.md",
    }  # fmt: skip
    assert len(listed) == len(set(listed))


def test_the_api_reference_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: dspark_kernels\.(?:\w+\.)?(\w+)$", page, re.M))
    code = {name: value for name, value in vars(dk).items() if inspect.isclass(value) or inspect.isfunction(value)}
    public = {name for name, value in code.items() if not name.startswith("_") and value.__module__ != "dspark_kernels.types"}
    modules = {"types", "cost", "scheduling", "calibration", "checkpoint"}
    assert public - shown == {"CostTable"} and shown - public == modules | {"Prepared"}


def test_the_readme_has_every_op():
    ops = {name for name, value in vars(dk).items() if getattr(value, "__module__", "").startswith("dspark_kernels.ops.")}
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| op |")[1].split("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines()[2:]]
    # accept_phases names the phases of accept_partial and launches nothing.
    assert sorted(sum(rows, [])) == sorted(ops - {"accept_phases"})


QUESTIONS = """
Where is the block rule decided?
What runs when I call accept_chain?
How do I add a head?
How do I add a rule?
How do I add an op?
Where do the random numbers come from?
""".strip().splitlines()


def test_where_is():
    section = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Where is ...?")[1].split("\n## ")[0]
    answers = {row[1].strip(): row[2] for row in (line.split("|") for line in section.splitlines() if line.startswith("| "))}
    assert set(QUESTIONS) <= set(answers)
    for question in QUESTIONS:
        assert 1 <= len(set(paths_in(answers[question]))) <= 3, question  # that they exist, test_paths_and_commands sees


def _labels(picture):
    return [node.text for node in ElementTree.parse(ROOT / "docs" / picture).iter("{http://www.w3.org/2000/svg}text")]


def test_pictures_name_what_there_is():
    folders = [name for label in _labels("architecture.svg") for name in label.split(", ") if re.fullmatch(r"[\w/]+(/|\.py)", name)]
    assert "kernels/primitives/" in folders
    assert [name for name in folders if not any((base / name).exists() for base in (ROOT, ROOT / dk.__name__))] == []
    ops = re.findall(r"[a-z]+_[a-z]+", " ".join(_labels("round.svg")))
    assert "accept_chain" in ops and [name for name in ops if not hasattr(dk, name)] == []


# --- figures ----------------------------------------------------------------------------------------------------------


def _rows(name):
    with (ROOT / "bench" / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def _flat(*parts):
    return " ".join(ROOT.joinpath(*parts).read_text(encoding="utf-8").split())


def test_figures_are_those_of_the_reports():
    """What the README says in passing; the table of bench.decode is run again in test_bench_decode.py."""
    readme, page = _flat("README.md"), _flat("docs", "benchmarks.md")
    compiled = _rows("compile.csv")
    assert not any(int(row[name]) for row in compiled for name in ("spill_stores", "spill_loads", "stack"))
    assert f"| {len(compiled)} of {len(compiled)}, eight GPU architectures |" in readme
    assert f"{len(compiled)} launches of the ops in their default configurations ({len(compiled) // 8} cases" in page

    ops = ("draft_block", "schedule_prefixes", "accept_chain")
    launches = collections.Counter()
    for row in _rows("launches.csv"):
        if row["op"] in ops:
            launches[row["contender"], row["setting"]] += int(row["launches"])
    ours, theirs = ([launches[who, how] for how in ("sampled", "greedy")] for who in ("dspark_kernels", "pytorch"))
    assert ours == [3, 3] and f"3, against at least {theirs[0]} (sampled) or {theirs[1]} (greedy) in plain PyTorch" in readme

    load = {row["policy"]: float(row["tokens_per_second"]) for row in _rows("load.csv") if row["concurrency"] == "512"}
    gain, loss = (abs(load["budget"] / load[policy] - 1) for policy in ("fixed-7", "none"))
    assert f"{gain:.0%} more tokens/s than verifying all 7 drafts, {loss:.0%} less".replace("%", " %") in readme

    measured = json.loads((ROOT / "bench" / "results" / "systems.json").read_text())["teacher_forced"]
    percent = {(run["domain"], run["system"]): [f"{100 * share:.0f}" for share in run["acceptance"]] for run in measured}
    code, docs, dspark = percent["code", "block"], percent["docs", "block"], percent["code", "dspark"]
    assert f"({code[0]} to {code[1]} % on code, {docs[0]} to {docs[1]} % on documentation)" in readme
    assert f"{dspark[0]} to {dspark[1]} % on code, {dspark[6]} % at draft 7" in readme


def test_sentences_about_the_systems_follow_from_their_figures():
    """Which curves fall, where, and how far; how tau, draft times and calibration compare (bench/assets/README.md, docs/benchmarks.md)."""
    found = json.loads((ROOT / "bench" / "results" / "systems.json").read_text())
    rows = {(row["domain"], row["system"]): row for row in found["teacher_forced"]}
    tau = {(row["domain"], row["system"], row["temperature"]): row["tau"] for row in found["decoded"]}
    at = lambda domain, system, draft: f"{100 * rows[domain, system]['acceptance'][draft - 1]:.0f}"  # noqa: E731
    texts, heads = ("code", "docs"), ("dspark", "dspark-gated", "dspark-rnn")
    assets, page = _flat("bench", "assets", "README.md"), _flat("docs", "benchmarks.md")

    fall = [[at(domain, "block", draft) for draft in (1, 2, 7)] for domain in texts]
    assert all(0.4 < int(second) / int(first) < 0.6 for first, second, _ in fall)
    (first, second, last), (docs_first, docs_second, docs_last) = fall
    assert (
        f"({first} to {second} % on code, {docs_first} to {docs_second} % on documentation) and is {last} and {docs_last} % at"
        in assets
    )
    (first, second, last), (docs_first, docs_second, docs_last) = ([at(d, "dspark", k) for k in (1, 2, 7)] for d in texts)
    falls = f"falls from {first} to {second} % and from {docs_first} to {docs_second} %, and is {last} and {docs_last} % at draft 7"
    assert f"DSpark's {falls}" in assets
    assert f"DSpark's falls from {first} to {second} % on code and from {docs_first} to {docs_second} % on documentation" in page
    high = [int(at("tables", system, draft)) for system in ("block", "dspark") for draft in range(1, 8)]
    assert f"both accept {min(high)} to {max(high)} % at every position" in assets
    assert f"MTP falls from {at('tables', 'mtp', 1)} to {at('tables', 'mtp', 7)} %" in assets
    late = [int(at(domain, "block", draft)) for domain in texts for draft in range(4, 8)]
    assert f"stays between {min(late)} and {max(late)} % from draft 4 on" in page

    gains = [round(rows[domain, head]["tau"] - rows[domain, "block"]["tau"], 1) for domain in texts for head in heads]
    assert f"{min(gains)} to {max(gains)} more per round there than the block" in assets
    times = {system: f"{ms[-1]:.1f}" for system, ms in found["draft_ms"].items()}
    assert f"in {times['dspark']} to {times['dspark-rnn']} ms against {times['block']}" in assets
    assert f"({times['mtp']} and {times['draft-model']} ms)" in assets
    for domain in texts:
        for temperature in (1.0, 0.0):
            best = max(tau[domain, head, temperature] for head in heads)
            assert tau[domain, "mtp", temperature] > best
            assert (tau[domain, "draft-model", temperature] > best) == ((domain, temperature) != ("code", 0.0))
    errors = {row["domain"]: f"{100 * row['before']:.1f} %" for row in found["calibration"]}
    assert errors["code"] == errors["prose"]
    assert f"error of {errors['code']} on code and prose and {errors['foreign']} on other languages" in assets
    assert sum(row["after"] < row["before"] for row in found["calibration"]) == 1 and "lower it in one of six cases" in assets


def test_the_readme_and_choose_repeat_the_table_of_decoding_methods():
    table = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").split("```")[1]
    tokens = [dict(re.findall(r"^(\S.*?)  +([\d.]+) ±", part, re.M)) for part in table.split("\nT = ")[1:]]
    assert len(tokens) == 2
    sampled, greedy = tokens
    pairs = {name: f"{sampled[name]} / {greedy[name]}" for name in ("dspark", "block", "mtp", "draft-model")}
    readme = _flat("README.md")
    assert f"| {pairs['dspark']}; {pairs['block']} |" in readme and f"| {pairs['mtp']}; {pairs['draft-model']} |" in readme
    page = _flat("docs", "choose.md")
    for pair, drafts in {pairs["draft-model"]: 4, pairs["mtp"]: 4, pairs["block"]: 7, pairs["dspark"]: 7}.items():
        assert f"| {pair} ({drafts} drafts) |" in page
    assert f"DSpark {greedy['dspark-tree, 16 nodes']} with 16 nodes against {greedy['dspark']} |" in page
    assert f"DSpark {sampled['dspark-tree, 16 nodes, sampled']} against {sampled['dspark']}." in page
    assert f"| {sampled['dspark-tree, 16 nodes, sampled']} / {greedy['dspark-tree, 16 nodes']} |" in readme


# --- words ------------------------------------------------------------------------------------------------------------

# Words that this project used in senses of its own, and the field's. Whole words, any case.
WORDS = {
    r"laws?": "distribution",
    r"coins?": "acceptance uniform",
    r"leaf": "vocabulary block (1024 ids)",
    r"leaves of 1024": "vocabulary blocks",
    r"units? of (64|256) ids": "sub-block",
    r"groups? of 128( ids)?": "max-group",
    r"mass(es)?": "sum of exponentials, probability",
    r"listed (proposals?|penalties|tokens|successors)": "sparse, penalised, successors",
    r"judg(e|es|ed|ing)": "verify, decide, apply",
    r"without chance": "deterministic",
    r"chances?": "probability",
    r"mixer": "gate or RNN projection",
    r"hoist(s|ed|ing)?": "precompute",
    r"plant(s|ed)?": "initialise; known-bad rule (mutant)",
    r"waves?": "phase",
    r"convict(s|ed|ing)?": "detect",
    r"clear(s|ed)": "pass",
    r"spoil(s|t|ed)?": "corrupt",
    r"mend(s|ed|ing)?": "patch",
    r"state slots?": "request slot",
}
# Where such a word is the field's own (waves: rounds of programs that fill a GPU).
FIELD = ("point mass", "probability mass", "turns, waves", "waves? of programs")


def old_words(text):
    """(line, word, what to write instead) in any text: a document, or a docstring. Code and addresses of links do not count."""
    text = LINK.sub(lambda found: found[0].split("](")[0], prose(text))
    text = re.sub(r"`[^`]+`", lambda found: "\n" * found[0].count("\n"), text)
    for phrase in FIELD:
        text = re.sub(phrase, "", text, flags=re.I)
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        for pattern, instead in WORDS.items():
            found += [(number, word[0], instead) for word in re.finditer(rf"\b{pattern}\b", line, re.I)]
    return found


def prose_of(source):
    """Docstrings and comments of a Python file, each on its line."""
    lines, kept = source.splitlines(), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            kept |= {number: lines[number - 1] for number in range(docstring.lineno, docstring.end_lineno + 1)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            kept[token.start[0]] = token.string
    return "\n".join(kept.get(number, "") for number in range(1, len(lines) + 1))


# Python files whose docstrings and comments are held to the table, and those that are not.
HELD = ("dspark_kernels", "reference", "bench", "examples", "tests")
EXEMPT = ("tests/package/test_docs.py",)


@functools.cache
def texts():
    """Name -> text of everything whose words are held to the table."""
    found = {str(document.relative_to(ROOT)): document.read_text(encoding="utf-8") for document in documents(ROOT)}
    for path in sorted(path for folder in HELD for path in (ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if not name.startswith(EXEMPT):
            found[name] = prose_of(path.read_text(encoding="utf-8"))
    return found


def undocumented(module):
    """Public classes and functions of a module, and public methods of its classes, that have no docstring of their own."""
    found = []
    for name, value in vars(module).items():
        if name.startswith("_") or not getattr(value, "__module__", "").startswith("dspark_kernels."):
            continue
        # A dataclass without a docstring gets its signature as one.
        found += [name] if not value.__doc__ or value.__doc__.startswith(f"{name}(") else []
        for method, code in vars(value).items() if inspect.isclass(value) else ():
            code = getattr(code, "fget", getattr(code, "__func__", code))
            if not method.startswith("_") and inspect.isfunction(code) and not code.__doc__:
                found.append(f"{name}.{method}")
    return found


@pytest.mark.parametrize("module", [dk, testing], ids=["dspark_kernels", "testing"])
def test_public_names_have_docstrings(module):
    assert undocumented(module) == []


def test_missing_docstrings_are_found():
    class Bare:
        def method(self):
            pass

    Bare.__module__ = "dspark_kernels.types"
    assert undocumented(types.SimpleNamespace(Bare=Bare, _private=Bare, Workspace=dk.Workspace)) == ["Bare", "Bare.method"]


@pytest.mark.parametrize("name", texts())
def test_words(name):
    assert old_words(texts()[name]) == []


@pytest.mark.parametrize(
    "text, words",
    [
        ("The target's law.", ["law"]),
        ("Coins and laws\nspoilt by chance", ["Coins", "laws", "spoilt", "chance"]),
        ("A planted mistake is convicted, a right rule cleared.", ["planted", "convicted", "cleared"]),
        ("a leaf of 1024 ids, its mass", ["leaf", "mass"]),
        ("a point mass on one id; `law` and `coin_words` in code; [paper](coins/law.md)", []),
        ("```\n+0.043 from its law\n```\n<!-- coins -->\nThe block follows, each launch leaves its counters clean.", []),
        ("law in `code that\ngoes on` and\na coin", ["law", "coin"]),
        ("groups of requests, a unit test, cache slots, a massive outlaw coincides, recommended", []),
    ],
)
def test_old_words_are_found_and_others_are_not(text, words):
    assert sorted(word for _, word, _ in old_words(text)) == sorted(words)


def test_prose_of_python_is_docstrings_and_comments():
    source = '"""One line."""\n\nlaw = "coin"  # a comment\n\n\ndef judge(leaf):\n    """Two\n    lines."""\n    return leaf\n'
    assert (
        prose_of(source).splitlines() == ['"""One line."""', "", "# a comment", "", "", "", '    """Two', '    lines."""', ""][:-1]
    )
