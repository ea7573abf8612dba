"""Downloads with the real clients, from a server on this machine: what is asked for, what is kept, what an error says."""

import importlib.util
import json
import os
import pty
import resource
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_server import Server, commit

from refmodels import hub, presets
from refmodels.loading import load_backbone
from refmodels.parameters import flatten
from refmodels.presets import data_directory, locate

missing = [name for name in ("huggingface_hub", "kagglehub") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (the extra `hub`)")

GOLDENS = Path(__file__).parent / "data" / "goldens"
T5 = data_directory() / "t5_tiny_numbers"
KAGGLE = "org/model/keras/tiny"

WORKER = """
import json, sys
from pathlib import Path
from refmodels.presets import locate
for line in sys.stdin:
    try:
        print(json.dumps(str(locate(json.loads(line)[0]).fetch(json.loads(line)[1]))), flush=True)
    except (OSError, ValueError) as error:
        print(json.dumps([*(c.__name__ for c in type(error).__mro__[:2]), str(error)]), flush=True)
"""

NEVER = {
    "README.md": b"",
    ".gitattributes": b"",
    "flax_model.msgpack": b"0",
    "tf_model.h5": b"0",
    "rust_model.ot": b"0",
    "onnx/model.onnx": b"0",
    "original/consolidated.pth": b"0",
    "model.fp16.safetensors": b"0",
    "training_args.bin": b"0",
    "../escape.json": b"{}",
    "assets/tokenizer/../../escape.json": b"{}",
}


def read(directory):
    files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if not name.startswith("golden.")}


def files_below(directory):
    return sorted(str(path.relative_to(directory)) for path in Path(directory).rglob("*") if path.is_file())


def environment_of(server, home):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "KAGGLE"))}
    kept = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
    caches = {"HOME": str(home), "HF_HOME": str(home / "hf"), "KAGGLEHUB_CACHE": str(home / "kaggle")}
    return kept | server.environment() | caches


@contextmanager
def worker(environment, limit=None):
    """`with worker(...) as fetch: fetch(handle)` runs the real clients in a process of their own.

    The answer is the directory, or for an error the names of its class and of the one above, and its message. No file of
    the process can have more than `limit` bytes.
    """

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=limited if limit else None,
    )

    def fetch(handle, weights=True):
        process.stdin.write(json.dumps([handle, weights]) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        return Path(answer) if isinstance(answer, str) else answer

    try:
        yield fetch
    finally:
        process.stdin.close()
        rest = process.stdout.read()
        process.stdout.close()
        assert (process.wait(), rest) == (0, "")


@pytest.fixture
def server():
    with Server() as server:
        yield server


@pytest.fixture
def environment(server, tmp_path):
    return environment_of(server, tmp_path)


@pytest.fixture
def client(environment):
    return lambda limit=None, **more: worker(environment | more, limit)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory):
    """A server and a client for tests that do not stop either, and that have names of their own."""
    with Server() as server, worker(environment_of(server, tmp_path_factory.mktemp("home"))) as fetch:
        yield server, fetch


@pytest.fixture
def shared(lasting):
    lasting[0].requests.clear()
    lasting[0].damaged.clear()
    return lasting


# -- what is asked for -----------------------------------------------------------------------------------------------

SAFETENSORS = ["model.safetensors"]
SHARDS = [f"model-{i:05}-of-00010.safetensors" for i in range(1, 11)]
KERAS_SHARDS = sorted(path.name for path in (GOLDENS / "keras_hub_0.32" / "opt_sharded").glob("model_*"))
TOKENIZERS = {
    "none": (),
    "files of GPT-2": ("vocab.json", "merges.txt", "tokenizer_config.json"),
    "SentencePiece": ("spiece.model", "special_tokens_map.json", "tokenizer.json"),
}


@pytest.mark.parametrize(
    ("golden", "more", "tokenizer", "weights"),
    [
        ("hf/opt", {"pytorch_model.bin": b"0", "model.safetensors.index.json": b"{}"}, "files of GPT-2", SAFETENSORS),
        ("hf/t5_relu_tied", {"pytorch_model-00001-of-00002.bin": b"0"}, "SentencePiece", SAFETENSORS),
        ("hf/opt_bin", {}, "none", ["pytorch_model.bin"]),
        ("hf/bloom_sharded", {"pytorch_model.bin": b"0"}, "none", ["model.safetensors.index.json", *SHARDS]),
        ("keras_hub_0.32/opt_sharded", {"model.safetensors": b"0"}, "none", ["model.weights.json", *KERAS_SHARDS]),
    ],
)
def test_hugging_face_sends_what_a_loader_opens_and_no_more(shared, golden, more, tokenizer, weights):
    server, fetch = shared
    files = {name: json.dumps(name).encode() for name in TOKENIZERS[tokenizer]}
    server.huggingface[golden] = {"main": read(GOLDENS / golden) | more | files | NEVER}
    small = ["config.json", *files]
    directory = fetch(f"hf://{golden}", weights=False)
    assert server.bodies() == sorted(small)
    assert fetch(f"hf://{golden}") == directory
    assert server.bodies() == sorted(small + weights)
    assert files_below(directory) == sorted(small + weights)
    server.requests.clear()
    assert fetch(f"hf://{golden}") == directory
    assert server.bodies() == []
    assert {request.what for request in server.requests} == {"api"}  # of which commit is `main`?
    assert "escape.json" not in str(list(directory.parents[3].rglob("*")))
    same(load_backbone(presets.Backbone, directory), load_backbone(presets.Backbone, GOLDENS / golden))


@pytest.mark.parametrize("golden", ["keras_hub_0.17/t5_flan_like", "keras_hub_0.32/opt_sharded"])
def test_kaggle_sends_what_a_loader_opens_and_no_more(shared, golden):
    server, fetch = shared
    model = f"org/model/keras/{Path(golden).name}"
    server.kaggle[model] = {1: read(T5), 7: read(GOLDENS / golden) | NEVER}
    weights = ["model.weights.json", *KERAS_SHARDS] if "sharded" in golden else ["model.weights.h5"]
    directory = fetch(f"kaggle://{model}", weights=False)
    assert server.bodies() == files_below(directory) == ["config.json"]
    assert fetch(f"kaggle://{model}/7") == directory
    assert server.bodies() == files_below(directory) == sorted(["config.json", *weights])
    server.requests.clear()
    assert fetch(f"kaggle://{model}") == directory
    assert server.bodies() == []
    same(load_backbone(presets.Backbone, directory), load_backbone(presets.Backbone, GOLDENS / golden))


@pytest.mark.parametrize("place", ["hf://assets", "kaggle://assets/x/keras"])
@pytest.mark.parametrize("preset", ["t5_tiny_numbers", "opt_tiny_stdlib"])
def test_assets_of_a_tokenizer(shared, place, preset):
    server, fetch = shared
    files = read(data_directory() / preset)
    server.huggingface[f"assets/{preset}"] = {"main": files}
    server.kaggle[f"assets/x/keras/{preset}"] = {1: files}
    directory = fetch(f"{place}/{preset}", weights=False)
    assets = [name for name in files if name.startswith("assets/")]
    assert files_below(directory) == sorted(["config.json", "tokenizer.json", *assets])
    assert all((directory / name).read_bytes() == files[name] for name in files_below(directory))


def same(backbone, other):
    assert backbone.get_config() == other.get_config()
    pairs = zip(flatten(backbone.params), flatten(other.params), strict=True)
    assert all(path == name and (mine == theirs).all() for (path, mine), (name, theirs) in pairs)


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["hf://org/name", f"kaggle://{KAGGLE}/1"])
def test_generate_downloads_and_standard_output_is_the_text(server, environment, place):
    server.huggingface["org/name"] = {"main": read(T5)}
    server.kaggle[KAGGLE] = {1: read(T5)}
    command = [sys.executable, "-m", "refmodels", "generate", place, "spell: 4207"]
    seen, shown = pty.openpty()  # a terminal for standard error: progress appears there
    termios.tcsetwinsize(shown, (24, 100))
    first = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=shown, env=environment)
    os.close(shown)
    assert (first.returncode, first.stdout) == (0, b"four thousand two hundred seven\n")
    assert b"%|" in os.read(seen, 100_000)
    os.close(seen)
    assert sorted(server.bodies()) == sorted(
        ["config.json", "tokenizer.json", "assets/tokenizer/vocabulary.spm", "model.weights.h5"]
    )
    server.requests.clear()
    second = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=environment)
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, b"")
    assert server.bodies() == []


@pytest.mark.parametrize("place", ["hf://org/name", f"kaggle://{KAGGLE}/1"])
def test_without_a_terminal_a_download_is_silent_and_an_error_is_one_line(server, environment, place):
    server.huggingface["org/name"] = {"main": read(T5)}
    server.kaggle[KAGGLE] = {1: read(T5)}
    for handle, status in ((place, 0), (place.replace("/name", "/other").replace("/tiny", "/other"), 2)):
        command = [sys.executable, "-m", "refmodels", "info", handle]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, text=True)
        assert done.returncode == status, done.stderr
        assert done.stderr.count("\n") == status // 2
        assert bool(done.stdout) == (status == 0)
    assert done.stderr.startswith(f"refmodels: error: {handle}: ")
    assert "model.weights.h5" not in server.bodies()


# -- interrupted, offline --------------------------------------------------------------------------------------------


def test_a_dropped_connection_is_taken_up_where_it_broke(server, client):
    weights = "model.weights.h5"
    files = read(GOLDENS / "keras_hub_0.17" / "opt") | {weights: bytes(range(256)) * (12 * 2**12)}
    server.huggingface["org/name"] = {"main": files}
    server.kaggle[KAGGLE] = {1: files}
    with client() as fetch:
        server.drop[weights] = 11 * 2**20
        directory = fetch("hf://org/name")
        if not isinstance(directory, Path):  # before its version 1.0 the client does not try again by itself
            assert "the download failed: ChunkedEncodingError" in directory[2]
            directory = fetch("hf://org/name")
        assert (directory / weights).read_bytes() == files[weights]
        starts = [request.start for request in server.requests if request.name == weights]
        assert starts == [0, 10 * 2**20]  # it writes pieces of this size
        server.requests.clear()
        server.drop[weights] = 3 * 2**20 + 5
        kind, _, message = fetch(f"kaggle://{KAGGLE}/1")
        assert kind == "DownloadError"
        assert "the connection to Kaggle failed (ChunkedEncodingError)" in message
        assert (fetch(f"kaggle://{KAGGLE}/1") / weights).read_bytes() == files[weights]
        starts = [request.start for request in server.requests if request.name == weights and request.what == "file"]
        assert starts == [0, 0, 3 * 2**20]  # the second asks how long it is


@pytest.mark.parametrize("place", ["hf://org/name", f"kaggle://{KAGGLE}", f"kaggle://{KAGGLE}/3"])
def test_without_a_network_the_cache_serves(server, client, place):
    server.huggingface["org/name"] = {"main": read(T5)}
    server.kaggle[KAGGLE] = {3: read(T5)}
    with client() as fetch:
        small = fetch(place, weights=False)
    server.__exit__()
    with client() as fetch:
        began = time.monotonic()
        assert fetch(place, weights=False) == small
        kind, _, message = fetch(place)
        assert kind == "DownloadError"
        assert message.startswith(f"{place}: ")
        assert "the connection to " in message
        assert "and the cache" in message
        assert time.monotonic() - began < 5
    again = Server(server.port)
    again.huggingface, again.kaggle = server.huggingface, server.kaggle
    with again, client() as fetch:
        whole = fetch(place)
        assert whole == small
    with client() as fetch:
        assert fetch(place) == whole
    assert files_below(whole) == sorted(set(files_below(T5)) - {"README.md", "held_out.json", "metadata.json"})


def test_the_switch_for_offline(server, client):
    server.huggingface["org/name"] = {"main": read(T5)}
    with client() as fetch:
        directory = fetch("hf://org/name")
    server.requests.clear()
    with client(HF_HUB_OFFLINE="1") as fetch:
        assert fetch("hf://org/name") == directory
        kind, _, message = fetch("hf://org/other")
        assert (kind, server.requests) == ("DownloadError", [])
        assert "HF_HUB_OFFLINE is set" in message


def test_kaggle_offline_takes_the_newest_complete_version(server, client, tmp_path):
    older, newer = read(T5), read(T5) | {"model.weights.h5": b"newer"}
    server.kaggle[KAGGLE] = {9: older, 10: newer, 11: newer}
    server.drop["model.weights.h5"] = 2
    with client() as fetch:
        assert fetch(f"kaggle://{KAGGLE}/11")[0] == "DownloadError"
        assert fetch(f"kaggle://{KAGGLE}/9").name == "9"
        assert fetch(f"kaggle://{KAGGLE}/10").name == "10"
    whole = tmp_path / "kaggle" / "models" / KAGGLE / "12"  # as kagglehub keeps a version that it downloaded whole
    server.__exit__()
    with client() as fetch:
        assert fetch(f"kaggle://{KAGGLE}/9").name == "9"
        assert fetch(f"kaggle://{KAGGLE}", weights=False).name == "11"
        assert "does not have all of it" in fetch(f"kaggle://{KAGGLE}/11")[2]
        (whole / "assets" / "tokenizer").mkdir(parents=True)
        for name, content in older.items():
            (whole / name).write_bytes(content)
        assert fetch(f"kaggle://{KAGGLE}", weights=False).name == "11"
        whole.with_name("12.complete").touch()
        assert fetch(f"kaggle://{KAGGLE}") == whole


# -- revisions and versions ------------------------------------------------------------------------------------------


def test_revisions(shared):
    server, fetch = shared
    one, two, three = ({"config.json": json.dumps({"n": n}).encode()} for n in range(3))
    server.huggingface["org/revisions"] = {"main": one, "v1.0": two, "refs/pr/1": three}
    server.moved["t5-small"] = "org/revisions"
    for revision, files in (("", one), ("@main", one), ("@v1.0", two), ("@refs/pr/1", three), (f"@{commit(two)}", two)):
        directory = fetch(f"hf://org/revisions{revision}", weights=False)
        assert (directory.name, (directory / "config.json").read_bytes()) == (commit(files), files["config.json"])
    assert (fetch("hf://t5-small", weights=False) / "config.json").read_bytes() == one["config.json"]
    server.huggingface["org/revisions"]["main"] = two  # the branch moves on
    assert fetch("hf://org/revisions", weights=False).name == commit(two)


def test_versions(shared):
    server, fetch = shared
    model = "org/versions/keras/x"
    server.kaggle[model] = {n: {"config.json": json.dumps({"n": n}).encode()} for n in (2, 10)}
    for version, n in (("/2", 2), ("/10", 10), ("", 10)):
        directory = fetch(f"kaggle://{model}{version}", weights=False)
        assert json.loads((directory / "config.json").read_text()) == {"n": n}


@pytest.mark.parametrize("place", ["hf://org/moving", "kaggle://org/moving/keras/x"])
def test_all_files_are_of_one_revision(shared, place):
    server, fetch = shared
    old = read(GOLDENS / "keras_hub_0.17" / "opt")
    new = old | {"model.weights.h5": b"another"}
    server.huggingface["org/moving"] = {"main": old, "old": old}
    server.kaggle["org/moving/keras/x"] = {1: old}
    server.then["config.json"] = lambda: (
        server.huggingface["org/moving"].update(main=new),
        server.kaggle["org/moving/keras/x"].update({2: new}),
    )
    assert (fetch(place) / "model.weights.h5").read_bytes() == old["model.weights.h5"]
    assert (fetch(place) / "model.weights.h5").read_bytes() == b"another"


def test_nothing_a_client_says_is_on_standard_output(server, client):
    server.kaggle[KAGGLE] = {1: read(T5)}
    with client(KAGGLE_API_TOKEN="a token") as fetch:  # it speaks of new versions to those who have signed in
        assert isinstance(fetch(f"kaggle://{KAGGLE}"), Path)


@pytest.mark.parametrize(
    "handle", ["hf://a/b@", "hf://a/b@../c", "hf://a/b@c//d", "hf://a/b@c/..", "hf://@main", "hf://a/b/c@d"]
)
def test_a_malformed_revision(handle):
    with pytest.raises(ValueError, match="is not of the form hf://org/name"):
        locate(handle)


# -- errors ----------------------------------------------------------------------------------------------------------


def test_what_the_servers_refuse(shared):
    server, fetch = shared
    config = read(T5)
    server.huggingface |= {name: {"main": config} for name in ("org/name", "org/gated", "org/closed", "org/down")}
    server.huggingface["org/empty"] = {"main": {"README.md": b""}}
    server.refused |= {"org/gated": (403, "GatedRepo"), "org/closed": (403, ""), "org/gone": (404, "RepoNotFound")}
    server.kaggle |= {KAGGLE: {1: config}, "org/gated/keras/x": {1: config}, "org/empty/keras/x": {1: {"README.md": b""}}}
    server.refused |= {"org/gated/keras/x": (403, ""), "org/down/keras/x": (503, "")}
    wanted = {
        "hf://org/nothing": ("MissingDownloadError", ["no such repository", "HF_TOKEN"]),
        "hf://org/gone": ("MissingDownloadError", ["no such repository", "HF_TOKEN"]),
        "hf://org/name@v9": ("MissingDownloadError", ["org/name has no revision 'v9'"]),
        f"hf://org/name@{'0' * 40}": ("MissingDownloadError", [f"org/name has no revision '{'0' * 40}'"]),
        "hf://org/gated": ("DownloadError", ["accept the licence", "/org/gated", "HF_TOKEN"]),
        "hf://org/closed": ("DownloadError", ["access is restricted", "/org/closed", "HF_TOKEN"]),
        "hf://org/empty": ("MissingDownloadError", ["no config.json"]),
        "kaggle://org/nothing/keras/x": ("MissingDownloadError", ["no such model"]),
        f"kaggle://{KAGGLE}/5": ("MissingDownloadError", ["no such model or version"]),
        "kaggle://org/empty/keras/x": ("MissingDownloadError", ["no config.json"]),
        "kaggle://org/gated/keras/x": ("DownloadError", ["accept the licence", "models/org/gated", "KAGGLE_API_TOKEN"]),
        "kaggle://org/down/keras/x": ("DownloadError", ["Kaggle answers with status 503"]),
    }
    for handle, (kind, parts) in wanted.items():
        found, parent, message = fetch(handle)
        assert (found, message.startswith(f"{handle}: ")) == (kind, True), (handle, found, message)
        assert parent in ("OSError", "DownloadError")
        assert "\n" not in message
        assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("place", ["hf://org/damaged", "kaggle://org/damaged/keras/x"])
def test_a_file_that_is_not_what_was_promised_is_not_kept(shared, place):
    server, fetch = shared
    files, weights = read(GOLDENS / "keras_hub_0.17" / "opt"), "model.weights.h5"
    server.huggingface["org/damaged"] = {"main": files}
    server.kaggle["org/damaged/keras/x"] = {1: files}
    server.damaged[weights] = files[weights][:-1000]
    kind, _, message = fetch(place)
    assert (kind, message.startswith(f"{place}: the download failed: ")) == ("DownloadError", True)
    server.damaged.clear()
    assert (fetch(place) / weights).read_bytes() == files[weights]


@pytest.mark.parametrize("place", ["hf://org/name", f"kaggle://{KAGGLE}/1"])
def test_a_full_disk(server, client, place):
    files = read(GOLDENS / "keras_hub_0.17" / "opt")
    server.huggingface["org/name"] = {"main": files}
    server.kaggle[KAGGLE] = {1: files}
    with client(limit=60_000) as fetch:
        kind, _, message = fetch(place)
        assert (kind, "\n" in message) == ("DownloadError", False)
        assert message.startswith(f"{place}: cannot write")
        assert "File too large" in message
    with client() as fetch:
        assert (fetch(place) / "model.weights.h5").read_bytes() == files["model.weights.h5"]


@pytest.mark.parametrize("shard", ["../../../escape", "/etc/passwd", "a/b", "*", "..", ".hidden", ""])
def test_an_index_that_leads_out_of_the_directory(shared, shard):
    server, fetch = shared
    index = json.dumps({"metadata": {}, "weight_map": {"/a/vars": shard}}).encode()
    config = (GOLDENS / "keras_hub_0.17" / "opt" / "config.json").read_bytes()
    files = {"config.json": config, "model.weights.json": index, shard: b"x"}
    server.huggingface["org/hostile"] = {"main": files}
    version = 1 + max(server.kaggle.setdefault("org/hostile/keras/x", {}), default=0)
    server.kaggle["org/hostile/keras/x"][version] = files
    for place in ("hf://org/hostile", "kaggle://org/hostile/keras/x"):
        kind, _, message = fetch(place)
        assert kind == "CheckpointError"
        assert f"model.weights.json: field 'weight_map' names {shard!r}" in message
    assert set(server.bodies()) <= {"config.json", "model.weights.json"}


def test_a_wrong_model_is_refused_before_its_weights_are_fetched(server, environment):
    server.huggingface["org/name"] = {"main": read(T5)}
    code = "import refmodels; refmodels.OPTBackbone.from_preset('hf://org/name')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, text=True)
    assert "holds T5Backbone, not OPTBackbone" in done.stderr
    assert server.bodies() == ["assets/tokenizer/vocabulary.spm", "config.json", "tokenizer.json"]


def test_a_built_in_name_without_kagglehub_names_another_source(monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(ImportError, match=r"needs kagglehub: pip install kagglehub; .*; hf://facebook/opt-125m is where"):
        locate("opt_125m_en").fetch()
    assert issubclass(hub.MissingDownloadError, FileNotFoundError)
