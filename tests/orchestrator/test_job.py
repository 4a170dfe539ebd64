"""Loading a job file: what is accepted, how faults are said, overrides, and writing it back."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from gangline.orchestrator.errors import ExitCode, UsageError
from gangline.orchestrator.job import (
    JobFileError,
    ScriptJob,
    TrainJob,
    dump_job,
    explain_mismatch,
    job_digest,
    load_job,
    parse_job,
    training_digest,
)

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))


def problems_of(text, *overrides, **options):
    with pytest.raises(JobFileError) as caught:
        parse_job(text, overrides, **options)
    return caught.value.problems


def train_job(text, overrides=(), **options) -> TrainJob:
    job = parse_job(text, overrides, **options)
    assert isinstance(job, TrainJob)
    return job


def script_job(text, overrides=(), **options) -> ScriptJob:
    job = parse_job(text, overrides, **options)
    assert isinstance(job, ScriptJob)
    return job


def paths_of(text, *overrides, **options):
    return [problem.path for problem in problems_of(text, *overrides, **options)]


def test_a_minimal_job_has_every_default():
    job = train_job("kind: train\n")
    assert (job.name, job.workers.count, job.training.steps) == ("job", 2, 300)
    assert job.train_config().model == job.model


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load_and_round_trip(path):
    job = load_job(path)
    assert job.name == path.stem.replace("_", "-")
    assert parse_job(dump_job(job)) == job
    assert path.read_text().startswith("# yaml-language-server: $schema=../docs/job-file.schema")


def test_importing_the_job_file_loads_nothing_heavy():
    code = (
        "import sys, gangline.orchestrator.job, gangline.orchestrator.plan\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_fault_is_reported_in_one_run():
    text = """\
kind: trian
modle: {}
name: My Job
model: {dim: 129, moe: {top_k: 22, every: 7}}
mesh: {expert_parallel: 3}
training: {stepps: 3, steps: '300', batch_size: 1_000, deterministic: yes}
optimizer: {betas: [1, 0.5], lr: 012}
data: {source: [3, no.md]}
workers: {memory_bytes: 4GiB, min: 3}
faults: {grace_s: 10s}
"""
    problems = problems_of(text)
    assert [(p.line, p.column, p.path) for p in problems] == [
        (1, 7, "kind"),
        (2, 1, "modle"),
        (3, 7, "name"),
        (4, 14, "model.dim"),
        (4, 32, "model.moe.top_k"),
        (4, 43, "model.moe.every"),
        (5, 25, "mesh.expert_parallel"),
        (5, 25, "mesh.expert_parallel"),
        (6, 12, "training.stepps"),
        (6, 30, "training.steps"),
        (6, 49, "training.batch_size"),
        (6, 71, "training.deterministic"),
        (7, 21, "optimizer.betas[0]"),
        (7, 34, "optimizer.lr"),
        (8, 17, "data.source[0]"),
        (9, 25, "workers.memory_bytes"),
        (9, 36, "workers.min"),
        (10, 19, "faults.grace_s"),
    ]
    mends = {problem.path: problem.mend for problem in problems}
    assert mends["kind"] == "did you mean train?"
    assert mends["modle"] == "did you mean model?"
    assert mends["name"] == "write for instance my-job"
    assert mends["training.stepps"] == "did you mean steps?"
    assert mends["training.steps"] == "write 300, without quotes"
    assert mends["training.batch_size"] == "write 1000"
    assert mends["training.deterministic"] == "write true"
    assert mends["workers.memory_bytes"] == "write 4294967296 (bytes)"
    assert mends["faults.grace_s"] == "write 10 (seconds)"


@pytest.mark.parametrize(
    ("line", "path", "found", "mend"),
    [
        ("training: {steps: 0}", "training.steps", "the whole number 0", "at least 1"),
        ("training: {steps: 1e2}", "training.steps", "the number 100.0", "write 100"),
        ("training: {steps: null}", "training.steps", "null", "the default, 300"),
        ("training: {steps: true}", "training.steps", "the truth value true", "300"),
        ("training: {precision: fp16}", "training.precision", "the text 'fp16'", "did you mean"),
        ("training: [1]", "training", "a list of 1 item", "steps: ..."),
        ("training:", "training", "null", "give it a value"),
        ("optimizer: {betas: [0.1]}", "optimizer.betas", "a list of 1 item", "[0.9, 0.95]"),
        ("model: {moe: yes}", "model.moe", "the text 'yes'", "every: ..."),
        ("learning_rate: 1", "learning_rate", "a key that is not known", "optimizer.lr?"),
        ("steps: 1", "steps", "a key that is not known", "training.steps?"),
        ("args: []", "args", "a key that is not known", "kind script"),
        ("description: 2026", "description", "the whole number 2026", 'quote it: "2026"'),
        ("cluster: {address: 'http://u:pw@h'}", "cluster.address", "(not shown)", "head"),
        ("storage: {root: s3://b}", "storage.root", "'s3://b'", "in full"),
        ("data: {source: ''}", "data.source", "the text ''", "remove the line"),
        (f"data: {{source: {'a' * 5000}}}", "data.source", "aaa'...", "shorten it by 904"),
    ],
)
def test_mends(line, path, found, mend):
    [problem] = problems_of(f"kind: train\n{line}\n")
    assert problem.path == path
    assert found in problem.found
    assert mend in problem.mend
    assert "pw" not in problem.render()


def test_a_disagreement_that_names_a_wrong_field_is_not_guessed_at():
    # 6 heads do not divide 128, but kv heads (4, wrong) and dim may be what is wrong.
    assert paths_of("kind: train\nmodel: {dim: x, num_heads: 6}\n") == ["model.dim"]
    # Other disagreements of the same section are still found.
    text = "kind: train\nmodel: {ffn_dim: x, num_heads: 6}\n"
    assert paths_of(text) == ["model.ffn_dim", "model.num_heads"]


def test_layout_is_checked_with_the_workers():
    text = "kind: train\nmodel: {moe: {}}\nmesh: {expert_parallel: 2}\nworkers: {count: 3}\n"
    [problem] = problems_of(text)
    assert problem.path == "mesh.expert_parallel"
    assert "workers.count to a multiple of 2" in problem.mend
    text = text.replace("3", "4, min: 3")
    [problem] = problems_of(text)
    assert (problem.path, problem.mend) == ("workers.min", "set workers.min to 2")
    assert parse_job(text.replace("min: 3", "min: 2")).legal_worker_counts() == (2, 4)
    assert paths_of("kind: train\ntraining: {batch_size: 1}\n") == ["training.batch_size"]


def test_a_missing_kind_does_not_hide_the_other_faults():
    assert paths_of("script: 3\nargss: []\n") == ["kind", "script", "argss"]
    assert paths_of("worker: {}\nfoo: 1\nworkers: {count: x}\n") == ["kind", "workers.count"]


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "sub").mkdir()
    source = "[notes.md, sub, '*.md', gone.md, '*.txt', '/gone/*/x', 'sub/**/*.md']"
    text = f"kind: train\ndata: {{source: {source}, tokenizer: tok.json}}\n"
    expected = ["data.source[3]", "data.source[4]", "data.source[5]", "data.tokenizer"]
    assert paths_of(text, base_dir=tmp_path) == expected
    job = train_job(text, base_dir=tmp_path, check_paths=False)
    assert job.data.source[0] == str(tmp_path / "notes.md")
    assert job.data.tokenizer == str(tmp_path / "tok.json")


def test_a_script_must_be_inside_its_folder(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "other.py").write_text("")
    (tmp_path / "code" / "link.py").symlink_to(tmp_path / "other.py")
    (tmp_path / "code" / "train.py").write_text("")
    text = "kind: script\nworking_dir: code\nscript: {}\n"
    for bad in ("../other.py", "/etc/x.py", "link.py", "gone.py", "train.sh", "a\\..\\b.py"):
        assert paths_of(text.format(bad), base_dir=tmp_path) == ["script"], bad
    job = script_job(text.format("train.py"), base_dir=tmp_path)
    assert (job.working_dir, job.script) == (str(tmp_path / "code"), "train.py")


def test_arguments_and_variables_are_taken_as_written():
    job = script_job(
        "kind: script\nscript: a.py\nenv: {A: 1, B: 1e3}\n"
        "args: [--lr, 1e-3, no, 0o14, true, '5']\n",
        ["env.C=0x10", "args[6]=007.50"],
        check_paths=False,
    )
    assert job.args == ["--lr", "1e-3", "no", "0o14", "true", "5", "007.50"]
    assert job.env == {"A": "1", "B": "1e3", "C": "0x10"}


TOKEN = "hf_" + "A1" * 20


@pytest.mark.parametrize(
    "line",
    [
        f"env: {{X: {TOKEN}}}",
        f"args: [{TOKEN}]",
        "env: {HF_TOKEN: abcdef}",
        "env: {DB_PASSWORD: abcdef}",
        "env: {AWS_SECRET_ACCESS_KEY: abcdef}",
        "env: {OPENAI_API_KEY: abcdef}",
        "tracking: {uri: 'https://me:abcdef@mlflow.example'}",
        "env: {X: 'postgresql://me:abcdef@db/x'}",
    ],
)
def test_secrets_are_refused_and_not_repeated(line):
    [problem] = problems_of(f"kind: script\nscript: a.py\n{line}\n", check_paths=False)
    assert "abcdef" not in problem.render()
    assert TOKEN not in problem.render()
    assert "env" in problem.mend


@pytest.mark.parametrize(
    "line",
    [
        "env: {TOKENIZERS_PARALLELISM: false, MAX_TOKENS: 5, PAD_TOKEN: x, TOKEN_FILE: /x}",
        "env_from: [HF_TOKEN]",
        "env: {HF_TOKEN: ''}",
    ],
)
def test_what_only_looks_like_a_secret_is_allowed(line):
    parse_job(f"kind: script\nscript: a.py\n{line}\n", check_paths=False)


def test_variables_that_gangline_sets_are_refused():
    text = "kind: script\nscript: a.py\nenv: {RANK: 1, RAY_x: 1, OK: 1}\nenv_from: [MASTER_ADDR]\n"
    assert paths_of(text, check_paths=False) == ["env.RANK", "env.RAY_x", "env_from[0]"]


# Overrides.


def test_overrides():
    job = train_job(
        "kind: train\nmodel: {moe: null}\n",
        [
            "training.steps=5",
            "training.steps=7",
            "model.moe.num_experts=4",
            "data.source[0]=python-docs",
            "data.source[1]=x y.md",
            "name=no",
            "optimizer.betas=[0.5, 0.6]",
            "tracking={enabled: false}",
            "description=",
        ][:-1],
        check_paths=False,
    )
    assert job.training.steps == 7
    assert job.model.moe is not None
    assert job.model.moe.num_experts == 4
    assert [Path(source).name for source in job.data.source] == ["python-docs", "x y.md"]
    assert (job.name, job.optimizer.betas, job.tracking.enabled) == ("no", (0.5, 0.6), False)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.stepps=5", "did you mean steps?"),
        ("training.steps=five", "--set training.steps: found the text 'five'"),
        ("training.steps.x=5", "has no keys"),
        ("data.source[3]=5", "item 3 of a list that has none"),
        ("kind[0]=5", "no list"),
        ("optimizer.betas[3]=5", "item 3 of optimizer.betas, which has 2"),
        ("training", "PATH=VALUE"),
        ("=5", "PATH=VALUE"),
        ("a..b=5", "PATH=VALUE"),
        ("[0]=5", "PATH=VALUE"),
        ("training.steps=[1", "broken YAML"),
        ("training.steps=012", "leading zeros"),
        ("env.A_TOKEN=abcdef", "did you mean"),
        (".".join("a" * 30) + "=1", "a path of 30 steps"),
    ],
)
def test_wrong_overrides(override, said):
    text = "kind: train\nmodel: {}\ntraining: {steps: 3}\noptimizer: {betas: [0, 0]}\n"
    problems = problems_of(text, override)
    line = problems[0].render("job.yaml")
    assert line.startswith("--set ")
    assert said in line or said == "did you mean"
    assert "abcdef" not in line


def test_an_override_mends_a_wrong_line():
    assert parse_job("kind: train\ntraining: {steps: x}\n", ["training.steps=5"])
    assert parse_job("kind: train\ntraining: x\n", ["training={}"])


# Files and names.


def test_the_name_comes_from_the_file(tmp_path):
    for file, name in [("My Job!.yaml", "my-job"), ("x.y.yml", "x.y"), ("é.yaml", "job")]:
        (tmp_path / file).write_text("kind: train")
        assert load_job(tmp_path / file).name == name
    assert load_job(tmp_path / "x.y.yml", ["name=z"]).name == "z"
    assert load_job(str(tmp_path / "x.y.yml"), name="w").name == "w"


@pytest.mark.parametrize("name", ["", "..", ".x", "-x", "a/b", "a b", "A", "a" * 55, "a\n", "é"])
def test_names_that_are_no_folder_names(name):
    assert paths_of(f"kind: train\nname: {json.dumps(name)}\n") == ["name"]


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "gone.yaml", tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(JobFileError) as caught:
            load_job(path)
        [problem] = caught.value.problems
        assert "no file that can be read" in problem.found


def test_a_file_that_never_ends():
    with pytest.raises(JobFileError, match="more than 262144 bytes"):
        load_job("/dev/zero")


def test_text_may_be_given_instead_of_a_path():
    assert load_job("kind: train\nname: x\n").name == "x"


def test_the_error_can_be_sent_and_shown():
    with pytest.raises(JobFileError) as caught:
        parse_job("kind: train\nx: 1\n", file="job.yaml")
    error: JobFileError = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert str(error) == error.render() == str(caught.value)
    assert error.exit_code == ExitCode.USAGE
    assert issubclass(JobFileError, UsageError)
    data = json.loads(json.dumps(error.to_json()))
    assert data["file"] == "job.yaml"
    assert data["problems"][0] | {"allowed": ""} == {
        "path": "x", "found": "a key that is not known here", "allowed": "", "mend": "remove it",
        "line": 2, "column": 1, "override": None,
    }  # fmt: skip


def test_a_flood_of_faults_is_counted():
    text = "kind: train\n" + "".join(f"x{i}: 1\n" for i in range(500))
    with pytest.raises(JobFileError) as caught:
        parse_job(text)
    assert len(caught.value.problems) == 100
    assert str(caught.value).endswith("and 400 more problems")


# Digests.

MOE = "kind: train\nmodel: {moe: {}}\n"


@pytest.mark.parametrize(
    "override",
    ["workers.count=4", "mesh.expert_parallel=2", "training.accumulation_steps=2",
     "checkpoint.every_steps=7", "faults.max_failures=0", "training.threads_per_worker=2",
     "training.eval_every_steps=9"],
)  # fmt: skip
def test_what_may_change_between_checkpoint_and_resume(override):
    old, new = parse_job(MOE), parse_job(MOE, [override])
    assert training_digest(old) == training_digest(new)
    assert explain_mismatch(old, new) == []
    assert job_digest(old) != job_digest(new)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.dim=64", "model.dim was 128 and is 64"),
        ("model.moe=null", "model.moe.every was 2 and is null"),
        ("model.moe.top_k=1", "model.moe.top_k was 2 and is 1"),
        ("data.seq_len=64", "data.seq_len was 256 and is 64"),
        ("optimizer.betas=[0.5, 0.5]", "optimizer.betas was [0.9, 0.95] and is [0.5, 0.5]"),
        ("training.steps=7", "training.steps was 300 and is 7"),
        ("training.seed=7", "training.seed was 0 and is 7"),
        ("training.precision=bf16", "training.precision was fp32 and is bf16"),
    ],
)
def test_what_may_not(override, sentence):
    old, new = parse_job(MOE), parse_job(MOE, [override])
    assert training_digest(old) != training_digest(new)
    assert sentence in [str(mismatch) for mismatch in explain_mismatch(old, new)]


def test_a_job_is_the_same_under_another_name_and_in_another_place(tmp_path):
    old = parse_job(MOE)
    new = parse_job(
        MOE,
        ["name=x", "description=y", "storage.root=/tmp", "tracking.enabled=false",
         "cluster.address=head:6379"],
    )  # fmt: skip
    assert job_digest(old) == job_digest(new)


def test_the_dataset_counts_and_not_its_path():
    old, new = (parse_job(MOE, [f"data.source={path}"], check_paths=False) for path in "ab")
    assert training_digest(old) != training_digest(new)
    same = [training_digest(job, dataset_digest="d") for job in (old, new)]
    assert same[0] == same[1] != training_digest(old, dataset_digest="e")


def test_digests_do_not_change_from_release_to_release():
    # A change here makes every checkpoint that exists unfit to go on from: do it knowingly.
    assert training_digest(parse_job(MOE))[:16] == "70fd2ff8b337677d"
