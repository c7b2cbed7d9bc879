"""A bridge pushed to the Hub and fetched again is unchanged. Nothing else is sent or fetched, and the card is honest."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
import torch

from ezhoi_diffusion.artifact import Artifact, BridgeError
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.evaluation.bootstrap import BootstrapResult, Difference
from ezhoi_diffusion.evaluation.comparison import Comparison, VariantResult
from ezhoi_diffusion.files import COMMITTED, read_json, write_json, write_tensors
from ezhoi_diffusion.hub import SharingError, build_upload, fetch, resolve_path
from ezhoi_diffusion.report.hub_card import model_card, read_report
from helpers import TESTS, fakehub
from helpers.bridges import features, make
from helpers.miniature import free_port, rewrite
from helpers.stores import write

MINIATURE = {
    "backbone": "ViT-B-16",
    "dataset": "hicodet",
    "zs_type": "unseen_verb",
    "weights": "a1b2" * 16,
    "options": {"vlmtxt": None},
}
PROVENANCE = {"fingerprint": MINIATURE, "training": {"step": 5000, "val_loss": 0.0123}}


# The Hub's client reads its environment when it is imported, so it lives in processes of its own, which are kept.
WORKER = """
import json, os, sys, time, traceback
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

time.sleep = lambda seconds: None  # the client waits between its tries
from ezhoi_diffusion.cli import main

for line in sys.stdin:
    asked = json.loads(line)
    os.environ["HF_TOKEN"] = asked["token"]
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(asked["words"]) if "words" in asked else exec(asked["code"], {})
        except BaseException:
            traceback.print_exc()
            status = 1
    print(json.dumps([status or 0, out.getvalue(), err.getvalue()]), flush=True)
"""


@dataclass
class Client:
    """A process with a Hub: client("push", …) is the command there, client.python(code) what that prints."""

    process: subprocess.Popen[str]
    home: Path

    def ask(self, token: str = fakehub.TOKEN, **asked) -> SimpleNamespace:
        print(json.dumps({**asked, "token": token}), file=self.process.stdin, flush=True)
        return SimpleNamespace(
            **dict(zip(("status", "out", "err"), json.loads(self.process.stdout.readline()), strict=True))
        )

    def __call__(self, *words: str, token: str = fakehub.TOKEN) -> SimpleNamespace:
        return self.ask(token, words=words)

    def push(self, *words: str) -> str:
        done = self("push", *words)
        assert done.status == 0, done.err
        return done.out

    def python(self, code: str) -> str:
        done = self.ask(code=code)
        assert done.status == 0, done.err
        return done.out

    def bridged(self, where: str, revision: str | None = None) -> torch.Tensor:
        """What the bridge of that name makes of features."""
        self.python(f"""
import torch
from ezhoi_diffusion import DiffusionBridge
from helpers.bridges import features
torch.save(DiffusionBridge.from_pretrained({where!r}, revision={revision!r})(features()), {str(self.home / "x.pt")!r})""")
        return torch.load(self.home / "x.pt", weights_only=True)

    def cached(self, name: str) -> set[str]:
        """Names of all files that were downloaded of a repository."""
        snapshots = self.home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots"
        return {str(path.relative_to(snapshots)).partition("/")[2] for path in snapshots.rglob("*") if path.is_file()}


@contextmanager
def client(endpoint: str, home: Path, **more: str):
    own = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    outside = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = {**outside, **own, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield Client(process, home)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def hub():
    with fakehub.running() as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub, home):
    with client(hub.url, home) as found:
        yield found


@pytest.fixture(scope="module")
def offline(hub, home):
    with client(hub.url, home, HF_HUB_OFFLINE="1") as found:
        yield found


@pytest.fixture(scope="module")
def unreachable(tmp_path_factory):
    with client(f"http://127.0.0.1:{free_port()}", tmp_path_factory.mktemp("nothing")) as found:
        yield found


@pytest.fixture
def name():
    """A repository of a test's own: what was fetched is kept."""
    return f"user/{uuid4().hex}"


@pytest.fixture
def bridge(tmp_path):
    """An artefact in the folder of a training, with much beside it that nobody else should get."""
    made = make()
    made.provenance = PROVENANCE
    made.context = {"ctx.0": torch.ones(2, 3)}
    folder = tmp_path / "bridge"
    made.save_pretrained(folder)
    for name in ("checkpoints/step-1/model.safetensors", "trackers/run", "training.json", "secret.safetensors", ".env"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private")
    return folder


OWN = {"config.json", "model.safetensors", "statistics.safetensors", "context.safetensors"}
POINTS = {"diffusion": (-3.25, -0.5), "mean_shift": (-20.0, 1.5)}


def comparison(provenance=PROVENANCE, intervals: bool = False, **changes) -> dict:
    """A report of two classes, `full` both of them and `rare` the second: 40 and 20 % without a bridge."""
    none = torch.tensor([0.6, 0.2], dtype=torch.float64)
    variants = {"none": VariantResult("none", none)}
    for name, (full, rare) in POINTS.items():
        variants[name] = VariantResult(
            name,
            none + torch.tensor([2 * full - rare, rare], dtype=torch.float64) / 100,
            baseline=name == "mean_shift",
            provenance=provenance,
            bootstrap=BootstrapResult({}, {}, {"none": DIFFERENCES[name]}) if intervals else None,
        )
    groups = {"full": torch.tensor([0, 1]), "rare": torch.tensor([1])}
    result = Comparison(
        variants, groups, 9658, 123456, torch.tensor([3, 4]), MINIATURE, replicates=1000 if intervals else 0
    )
    return {**result.to_dict(), **changes}


DIFFERENCES = {
    "diffusion": {
        "full": Difference(-4.125, -2.25, 0.001, 0.002, -4.5, -2.0, 0.5),
        "rare": Difference(-1.5, 0.75, 0.4, 0.5, -2.0, 1.0, 0.6),
    },
    "mean_shift": {
        "full": Difference(-22.0, -18.0, 0.001, 0.002, -23.0, -17.0, 1.0),
        "rare": Difference(0.5, 2.5, 0.01, 0.02, 0.25, 2.75, 0.5),
    },
}


def without(*names: str, **changes) -> dict:
    """`comparison()` without some variants, and with changes to the diffusion bridge's."""
    shown = comparison()
    shown["variants"] = [
        {**v, **(changes if v["name"] == "diffusion" else {})} for v in shown["variants"] if v["name"] not in names
    ]
    return shown


def report(folder: Path, content: dict) -> Path:
    folder.mkdir()
    write_json(folder / "report.json", content)
    return folder


def one_line(done: SimpleNamespace) -> str:
    assert done.status == 2, done.err
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("ezhoi-diffusion: error: ")
    return done.err


@pytest.mark.parametrize("mode", ["regular", "lfs"])
def test_what_was_pushed_comes_back_bit_for_bit_and_nothing_else_was_sent(
    hub, online, bridge, name, tmp_path, monkeypatch, mode
):
    monkeypatch.setattr(hub, "mode", mode)
    out = online.push(str(bridge), name, "--report", str(report(tmp_path / "report", comparison())), "--license", "mit")
    repository = hub.repositories[name]
    assert not repository.private
    assert len(repository.commits) == 2, "the Hub's own, and one commit of ours"
    sent = repository.commits[-1]
    assert sent.keys() == OWN | {"README.md", ".gitattributes"}
    assert all(sent[file] == (bridge / file).read_bytes() for file in OWN)
    assert f"{hub.url}/{name}/commit/{repository.oid()}" in out
    unwanted = ("pytorch_model.bin", "weights.pkl", "setup.py", "other.safetensors", "more/model.safetensors")
    sent.update(dict.fromkeys(unwanted, b"\x80\x04."))
    hub.served.clear()
    assert torch.equal(online.bridged(name), DiffusionBridge.from_pretrained(bridge)(features()))
    assert online.cached(name) == OWN
    assert {served.rpartition("/")[2] for served in hub.served} == OWN


def test_python_pushes_too_and_a_revision_is_kept(hub, online, offline, bridge, name, tmp_path):
    load = f"from ezhoi_diffusion import DiffusionBridge\nbridge = DiffusionBridge.from_pretrained({str(bridge)!r})\n"
    out = online.python(
        f"from pathlib import Path\nfrom ezhoi_diffusion import push_to_hub\n"
        f"print(push_to_hub(Path({str(bridge)!r}), {name!r}, private=True))"
    )
    repository = hub.repositories[name]
    assert repository.private
    assert out == f"{hub.url}/{name}/commit/{repository.oid()}\n"
    first = repository.oid()
    changed = tmp_path / "changed"
    online.python(f"{load}bridge.override(blend=0.9).save_pretrained({str(changed)!r})")
    online.push(str(changed), name, "--private")
    stored = DiffusionBridge.from_pretrained(bridge)
    before, after = stored(features()), stored.override(blend=0.9)(features())
    assert torch.equal(online.bridged(name), after)
    assert torch.equal(online.bridged(name, revision=first), before)
    assert torch.equal(online.bridged(f"hf:{name}@{first}"), before)
    assert torch.equal(offline.bridged(name), after), "what was fetched needs no network"


def test_a_name_on_the_hub_works_wherever_a_folder_does(online, bridge, name):
    online.push(str(bridge), name)
    out = online.python(f"""
from pathlib import Path
from types import SimpleNamespace
import torch
from ezhoi_diffusion.builtin.diffusion import plugin
from ezhoi_diffusion.pipeline.steps import bridge_folders
from ezhoi_diffusion.evaluation.variants import resolve_variants
from ezhoi_diffusion.plugins import PluginManager

seen, plugins = [], PluginManager()
check = lambda bridge, name: seen.append(bridge.provenance["training"]["step"])
spec = "none,mean_shift,diffusion=hf:{name}@main"
resolve_variants(spec, plugins, folder="hf:{name}", check=check, device=torch.device("cpu"))
args = SimpleNamespace(compare="", bridge="hf:{name}", plugin_folders={{}}, set=[], inference_steps=None)
cpu = torch.device("cpu")
run = SimpleNamespace(args=args, plugins=plugins, check_fingerprint=check, device=cpu, applied_settings=set())
plugin.on_attach(run)
(folder,) = bridge_folders("none,diffusion=hf:{name}", [])
print(*seen, (Path(folder) / "config.json").is_file())
""")
    assert out == "5000 5000 5000 True\n"


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.fixture(scope="module")
def features_folder(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("captured") / "features").folder)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("model.safetensors", flipped, "model.safetensors was changed after it was written"),
        ("statistics.safetensors", lambda content: content + b" ", r"statistics.safetensors has \d+ bytes where"),
        ("model.safetensors", None, "lacks config.json or a file that it names"),
        (
            "config.json",
            lambda content: content.replace(b"5000", b"6000"),
            "config.json was changed after it was written",
        ),
        ("config.json", None, "lacks config.json or a file that it names"),
    ],
)
def test_what_is_not_whole_on_the_hub_is_refused(hub, online, bridge, name, features_folder, file, change, says):
    online.push(str(bridge), name)
    files = hub.repositories[name].commits[-1]
    content = files.pop(file)
    if change is not None:
        files[file] = change(content)
    assert re.search(says, one_line(online("compare", features_folder, "--bridge", f"hf:{name}")))


@pytest.mark.parametrize(
    "file", ["../../x.safetensors", "a/x.safetensors", "x.pkl", "x.bin", ".safetensors", "x*.safetensors"]
)
def test_a_config_that_names_other_files_is_refused_before_they_are_asked_for(
    hub, online, bridge, name, features_folder, file
):
    rewrite(bridge / "config.json", files={file: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(BridgeError, match=r"config\.json has a wrong entry.*`\$\.files`"):
        build_upload(bridge, name, card="")
    repository = hub.repositories[name] = fakehub.Repository()
    repository.commits[-1]["config.json"] = (bridge / "config.json").read_bytes()
    hub.served.clear()
    assert "has a wrong entry" in one_line(online("compare", features_folder, "--bridge", f"hf:{name}"))
    assert {served.rpartition("/")[2] for served in hub.served} == {"config.json"}


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder: (folder / "context.safetensors").unlink(), "context.safetensors cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "where [0-9]+ were written"),
        (lambda folder: (folder / "config.json").write_text("{}"), "has no checksum"),
        (shutil.rmtree, "config.json cannot be read"),
        (lambda folder: rewrite(folder / "config.json", bridge="a b"), "config.json has a wrong entry"),
        (lambda folder: rewrite(folder / "config.json", files=with_nan(folder)), "ctx.0 holds NaN or infinity"),
    ],
)
def test_what_is_not_a_whole_artefact_is_not_pushed(bridge, capsys, harm, says):
    harm(bridge)
    assert main(["push", str(bridge), "user/name"]) == 2
    assert re.search(rf"^ezhoi-diffusion: error: .*{says}.*\n$", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"denoiser": "nobody"}, "nobody"),
        ({"denoiser_options": {"width": 17}}, "model.safetensors: it lacks blocks.1"),
        ({"num_timesteps": 2**70}, "num_timesteps"),
    ],
)
def test_what_no_reader_takes_is_not_pushed(bridge, capsys, mocker, change, says):
    """Every file is whole, and the bridge cannot be loaded."""
    rewrite(bridge / "config.json", **change)
    sent = mocker.patch("huggingface_hub.HfApi")
    for flags in ([], ["--dry-run"]):
        assert main(["push", str(bridge), "user/name", *flags]) == 2
        assert says in capsys.readouterr().err
    sent.assert_not_called()


def test_a_bridge_whose_move_into_place_was_interrupted_is_pushed_whole(bridge):
    whole = build_upload(bridge, "user/name", card="")
    (bridge / COMMITTED).mkdir()
    for file in ("config.json", "model.safetensors"):
        (bridge / file).rename(bridge / COMMITTED / file)
    (bridge / "model.safetensors").write_bytes(b"of an older bridge")
    assert build_upload(bridge, "user/name", card="") == whole


def with_nan(folder: Path) -> dict:
    facts = write_tensors(folder / "context.safetensors", {"ctx.0": torch.tensor([float("nan")])})
    return {**read_json(folder / "config.json", dict, SharingError, "")["files"], "context.safetensors": facts}


@pytest.mark.parametrize(
    ("where", "words", "token", "says"),
    [
        ("online", ["user/new"], "hf_bad", "hf auth login"),
        ("online", ["other/new"], fakehub.TOKEN, "hf auth login"),
        (
            "online",
            ["user/new", "--license", "none"],
            fakehub.TOKEN,
            'correct what it names .*"license" must be one of',
        ),
        ("online", ["user/-new-"], fakehub.TOKEN, "correct what it names"),
        ("online", ["new"], fakehub.TOKEN, "give USER/NAME"),
        ("online", ["user/public", "--private"], fakehub.TOKEN, "exists and is public, so nothing was uploaded"),
        ("unreachable", ["user/new"], fakehub.TOKEN, "network, HF_ENDPOINT and HF_HUB_OFFLINE"),
        ("offline", ["user/new"], fakehub.TOKEN, "network, HF_ENDPOINT and HF_HUB_OFFLINE"),
    ],
)
def test_a_push_that_fails_is_one_line_with_the_remedy(hub, request, bridge, where, words, token, says):
    hub.repositories["user/public"] = fakehub.Repository()
    done = request.getfixturevalue(where)("push", str(bridge), *words, token=token)
    assert re.search(says, one_line(done))
    named = [hub.repositories[word] for word in ("user/new", "user/public") if word in hub.repositories]
    assert all(len(repository.commits) == 1 for repository in named), "nothing was committed"


@pytest.mark.parametrize(
    ("where", "bridge_id", "token", "says"),
    [
        ("online", "hf:user/none", fakehub.TOKEN, "the Hub shows no such repository"),
        ("online", "hf:user/none", "hf_bad", "the Hub shows no such repository"),
        ("online", "hf:user/secret", "hf_bad", "for a private or gated one log in with `hf auth login`"),
        (
            "online",
            "hf:user/empty@v2",
            fakehub.TOKEN,
            "user/empty at v2 cannot be fetched: the repository has no such revision",
        ),
        ("online", "hf:user/empty", fakehub.TOKEN, "lacks config.json"),
        ("online", "hf:empty", fakehub.TOKEN, "give USER/NAME"),
        ("unreachable", "hf:user/empty", fakehub.TOKEN, "network, HF_ENDPOINT and HF_HUB_OFFLINE"),
        ("offline", "hf:user/empty", fakehub.TOKEN, "network, HF_ENDPOINT and HF_HUB_OFFLINE"),
    ],
)
def test_a_fetch_that_fails_is_one_line_with_the_remedy(hub, request, features_folder, where, bridge_id, token, says):
    hub.repositories.update({"user/empty": fakehub.Repository(), "user/secret": fakehub.Repository(private=True)})
    done = request.getfixturevalue(where)("compare", features_folder, "--bridge", bridge_id, token=token)
    assert re.search(says, one_line(done))


def test_a_cache_that_cannot_be_written_is_one_line_too(hub, features_folder, bridge, online, name, tmp_path):
    online.push(str(bridge), name)
    (tmp_path / "file").touch()
    with client(hub.url, tmp_path / "file" / "home") as lost:
        done = lost("compare", features_folder, "--bridge", f"hf:{name}")
    assert re.search(f"{name} cannot be fetched: the disk refused .*file.*HF_HOME", one_line(done))


def test_a_folder_here_comes_first_and_a_path_is_never_a_name(bridge, monkeypatch):
    monkeypatch.chdir(bridge.parent.parent)
    named = f"{bridge.parent.name}/{bridge.name}"
    assert resolve_path(named, bare=True) == Path(named)
    assert resolve_path(Path("no/such"), bare=True) == Path("no/such")
    assert resolve_path("no/such") == Path("no/such")
    with pytest.raises(SharingError, match="'v1' is for a bridge on the Hub"):
        DiffusionBridge.from_pretrained(named, revision="v1")
    with pytest.raises(SharingError, match="give USER/NAME"):
        fetch("a/b/c")


# The card


def table(card: str, section: str) -> dict[str, list[str]]:
    """First cell -> the others, of the table below a heading."""
    text = card.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {first: rest for first, *rest in rows}


def test_the_card_has_the_numbers_of_the_comparison(bridge, tmp_path):
    shown = read_report(report(tmp_path / "report", comparison(intervals=True)))
    card = model_card(bridge, shown)
    rows = table(card, "What it does to mAP")
    assert rows["mAP"] == ["`full`", "`rare`"]
    for variant in shown["variants"]:
        cells = [float(cell) for cell in rows[f"`{variant['name']}`"]]
        assert cells == pytest.approx([*variant["mean_ap"].values()], abs=0.005)
    assert rows["`diffusion` − `none`"] == ["-3.25 (-4.12 to -2.25, p 0.002)", "-0.50 (-1.50 to +0.75, p 0.500)"]
    assert rows["`mean_shift` − `none`"] == ["-20.00 (-22.00 to -18.00, p 0.002)", "+1.50 (+0.50 to +2.50, p 0.020)"]
    assert "9658 images, 123456 pairs" in card
    assert "classes: `full` 2, `rare` 1" in card
    assert "1000 replicates, 95% intervals" in card


@pytest.mark.parametrize(
    ("points", "low", "high", "p", "verdict"),
    [
        (1.5, 0.5, 2.5, 0.02, "**a gain**"),
        (-1.5, -2.5, -0.5, 0.02, "**a loss**"),
        (1.5, 0.5, 2.5, 0.06, "may be chance"),
        (-1.5, -2.5, -0.5, 0.06, "may be chance"),
        (0.2, -0.1, 0.5, 0.04, "may be chance"),
        (-0.2, -0.5, 0.1, 0.04, "may be chance"),
    ],
)
def test_a_loss_is_written_as_plainly_as_a_gain(bridge, points, low, high, p, verdict):
    shown = comparison(intervals=True)
    measured = shown["variants"][1]
    measured["difference"]["full"] = points
    measured["bootstrap"]["over"]["none"]["full"] = {"low": low, "high": high, "p": p, "p_adjusted": p}
    measured["bootstrap"]["over"]["mean_shift"] = {"full": {"low": 1.0, "high": 2.0, "p": 0.01, "p_adjusted": 0.02}}
    line = f"- `diffusion`, `full`: {points:+.2f} points of mAP, 95% interval {low:+.2f} to {high:+.2f}, p {p:.3f}: {verdict}."
    assert line in model_card(bridge, shown).splitlines()


def test_a_gain_that_a_baseline_has_too_is_none(bridge):
    shown = comparison(intervals=True)
    measured = shown["variants"][1]
    measured["difference"]["full"] = 1.5
    measured["bootstrap"]["over"]["none"]["full"] = {"low": 0.5, "high": 2.5, "p": 0.01, "p_adjusted": 0.02}
    measured["bootstrap"]["over"]["mean_shift"] = {"full": {"low": -0.5, "high": 2.0, "p": 0.1, "p_adjusted": 0.2}}
    card = model_card(bridge, shown)
    assert "p 0.020: higher than bare EZ-HOI, but no sure gain over `mean_shift`." in card
    assert "**a gain**" not in card


def test_the_p_value_of_the_primary_endpoint_is_not_adjusted(bridge):
    shown = comparison(intervals=True)
    measured = shown["variants"][1]
    measured["difference"]["full"] = 1.5
    apart = {"low": 0.5, "high": 2.5, "p": 0.01, "p_adjusted": 0.2}
    measured["bootstrap"]["over"] |= {"none": {**measured["bootstrap"]["over"]["none"], "full": apart}}
    measured["bootstrap"]["over"]["mean_shift"] = {"full": apart}
    assert "p 0.200: may be chance." in model_card(bridge, shown)
    card = model_card(bridge, {**shown, "primary": "diffusion"})
    assert "p 0.010: **a gain**." in card
    assert "save for full mAP of `diffusion`, the primary endpoint." in card


def test_the_card_of_one_seed_has_the_results_of_all(bridge):
    shown = comparison(intervals=True)
    measured = shown["variants"][1]
    group = {
        "variants": ["diffusion/seed-0", "diffusion/seed-1"],
        "difference": measured["difference"],
        "bootstrap": measured["bootstrap"],
    }
    shown["seed_groups"] = {"diffusion": group}
    measured.update(
        name="diffusion/seed-0", seed_group="diffusion", difference={"full": 9.0, "rare": 9.0}, bootstrap=None
    )
    card = model_card(bridge, shown)
    assert (
        "- `diffusion (mean of 2 seeds)`, `full`: -3.25 points of mAP, 95% interval -4.12 to -2.25, p 0.002: **a loss**."
        in card
    )
    assert "9.00" not in card


@pytest.mark.parametrize(
    ("points", "says"),
    [
        (0.3, "+0.30 points of mAP (higher)"),
        (-0.3, "-0.30 points of mAP (lower)"),
        (0.001, "+0.00 points of mAP (no change)"),
    ],
)
def test_without_intervals_the_card_says_that_chance_was_not_examined(bridge, points, says):
    shown = comparison()
    shown["variants"][1]["difference"]["full"] = points
    card = model_card(bridge, shown)
    assert f"- `diffusion`, `full`: {says}; there are no intervals, so it may be chance." in card.splitlines()
    assert "**a " not in card


def test_circumstances_of_a_comparison_are_in_the_card(bridge):
    shown = comparison(
        {**PROVENANCE, "overridden": {"num_steps": 7}},
        forced=["made for | another `run`"],
        degraded={"p": "p went off"},
        setting="known-object",
    )
    card = model_card(bridge, shown)
    assert "- **Forced:** made for &#124; another &#96;run&#96;" in card
    assert "- **Degraded:** `p went off`" in card
    assert "setting `known-object`" in card
    assert '- **Not as stored:** `diffusion` was applied with `{"num_steps": 7}`' in card
    assert "- Baselines: `mean_shift`. A gain is a gain over all of them." in card
    shown["variants"][1]["difference"]["rare"] = float("nan")
    assert "- `diffusion`, `rare`: not measured, because nothing is annotated." in model_card(bridge, shown)


def test_a_card_without_a_comparison_says_that_nothing_was_measured(bridge):
    card = model_card(bridge, None)
    assert "\n## What it does to mAP\n\nNothing was measured: " in card
    assert "points of mAP" not in card


@pytest.mark.parametrize(
    "content",
    [
        comparison({**PROVENANCE, "training": {"step": 1}}),
        without("diffusion"),
        without(name="diffusion-2"),
    ],
)
def test_a_report_of_another_bridge_is_refused(bridge, tmp_path, capsys, content):
    shown = report(tmp_path / "report", content)
    assert main(["push", str(bridge), "user/name", "--report", str(shown), "--dry-run"]) == 2
    assert "none of them is the bridge 'diffusion' of these files" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        {"a": 1},
        {**comparison(), "images": None},
        without(difference={"full": "x", "rare": 1.0}),
        without("none", "diffusion", "mean_shift"),
    ],
)
def test_what_is_no_report_is_refused(bridge, tmp_path, content):
    with pytest.raises(SharingError, match=r"report\.json has a wrong entry"):
        model_card(bridge, read_report(report(tmp_path / "report", content)))


def test_the_card_names_the_run_the_recipe_and_the_training(bridge):
    card = model_card(bridge, None, repo_id="user/name", license="mit")
    run, applied, made = (table(card, s) for s in ("The run it is for", "How it is applied", "How it was made"))
    assert run["`backbone`"] == ["`ViT-B-16`"]
    assert run["`weights`"] == [f"`{MINIATURE['weights']}`"]
    assert run["`options.vlmtxt`"] == ["`null`"]
    assert "A run with another flag, weight or context vector refuses it" in card
    assert "--restore-context" in card
    assert (applied["`recipe.name`"], applied["`recipe.blend`"]) == (["`gentle`"], ["`0.3`"])
    assert (made["`training.step`"], made["`training.val_loss`"]) == (["`5000`"], ["`0.0123`"])
    assert "--plugin diffusion=hf:user/name\n" in card
    assert "DiffusionBridge.from_pretrained('user/name')" in card
    assert card.startswith('---\nlibrary_name: ezhoi-diffusion\nlicense: "mit"\ntags:\n')
    unlicensed = model_card(bridge, None)
    assert "license:" not in unlicensed
    assert "The author states no licence." in unlicensed


def test_a_bridge_without_an_origin_says_so(bridge):
    rewrite(bridge / "config.json", provenance={})
    card = model_card(bridge, None)
    assert "Every run refuses it unless `--force` is given" in card
    assert "\n## How it was made\n\nIts files do not state it." in card


def test_a_third_partys_bridge_is_shared_alike(tmp_path):
    Artifact("linear-map", {"rank": 3}, {"map.safetensors": {"weight": torch.eye(3)}}).save(tmp_path)
    card = model_card(tmp_path, None, repo_id="user/name")
    files = build_upload(tmp_path, "user/name", card=card)
    assert files.keys() == {"config.json", "map.safetensors", "README.md"}
    assert files["README.md"].decode() == card
    assert "--compare none,identity,linear-map=hf:user/name" in card
    assert "contributes the bridge `linear-map`" in card
    assert table(card, "How it is applied")["`rank`"] == ["`3`"]


def test_what_files_say_is_no_markup(bridge):
    evil = "x`|<img src=e>\n# [a](http://b) --- \u202e"
    rewrite(bridge / "config.json", provenance={"fingerprint": {"dataset": evil, evil: "<b>"}, evil: {"k": evil}})
    card = model_card(bridge, None, license='mit"\nlibrary_name: other')
    for harm in ("<img", "\n# [", "](http://b)", "\u202e"):
        assert harm not in card
    assert all(line.count(" | ") == 1 for line in card.splitlines() if line.startswith("| ") and "x&#96;&#124;" in line)
    assert "| `<b>` |" in card
    import yaml

    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["library_name"], front["license"]) == ("ezhoi-diffusion", 'mit"\nlibrary_name: other')
    assert "hicodet" not in front["tags"]


def test_a_dry_run_shows_card_and_files_and_asks_nobody(unreachable, bridge):
    out = unreachable.push(str(bridge), "user/name", "--dry-run")
    assert out.startswith("---\nlibrary_name: ezhoi-diffusion\n")
    listed = {
        name: int(size.replace(",", "")) for size, name in re.findall(r"^ *([\d,]+) bytes  (\S+)$", out, re.MULTILINE)
    }
    assert listed.keys() == OWN | {"README.md"}
    assert all(listed[name] == (bridge / name).stat().st_size for name in OWN)


def test_a_bridge_of_this_disk_needs_no_client(bridge):
    code = f"import sys\nfrom ezhoi_diffusion import DiffusionBridge\nDiffusionBridge.from_pretrained({str(bridge)!r})\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "huggingface_hub" not in done.stdout.split()
