"""Many models in one go: what a file may say, and that one model's failure is not the others'."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_gguf import batch, doctor, factory, manifest, proof, survey
from gemma_gguf.doctor import Check, Facts, Need, Room
from gemma_gguf.errors import BadInputError, ToolFailedError
from gemma_gguf.llama_cpp import Build
from gemma_gguf.recipes import DEFAULT_NAMES, Recipe
from gemma_gguf.session import CardOptions, Done, Options, Report
from gemma_gguf.settings import Settings
from tests import checkpoints
from tests.test_settings import EVERYTHING, OPTIONS, call


def read(text: str, here: Path, base: Settings | None = None) -> list[Options]:
    (here / "models.toml").write_text(text)
    return [item.options for item in batch.read(Path("models.toml"), base or Settings())]


# --- what a file says ---------------------------------------------------------------------------------------------


def test_a_list_of_names_is_enough(here: Path) -> None:
    assert read("models = ['google/gemma-3-1b-it', 'demo']", here) == [
        Options(model="google/gemma-3-1b-it"),
        Options(model="demo"),
    ]


def test_a_model_goes_before_the_file_and_the_file_before_the_settings(here: Path) -> None:
    (here / "mine").mkdir()
    (here / "text.txt").write_text("text")
    (here / "imatrix.gguf").write_text("")
    base = Settings(threads=1, jobs=1, chunks=1, namespace="me", recipe_sets={"tiny": ["Q2_K"]})
    first, second = read(
        """
        jobs = 2
        chunks = 2
        languages = ["ja"]
        recipes = ["small", "OWN"]
        [recipe_sets]
        small = ["Q4_K_M", "Q6_K"]
        [[custom_recipes]]
        name = "OWN"
        ftype = "Q4_0"
        about = "Mine"
        [[models]]
        model = "google/gemma-3-1b-it@main"
        chunks = 3
        repo = "you/it"
        calibration = "text.txt"
        [[models]]
        model = "mine"
        name = "me/mine"
        recipes = ["default", "tiny"]
        naming = "model"
        evaluate = false
        out = "elsewhere"
        cmake_args = ["-DA=1"]
        """,
        here,
        base,
    )
    own = Recipe("OWN", "Q4_0", "Mine")
    assert first == Options(
        model="google/gemma-3-1b-it@main",
        recipes=("Q4_K_M", "Q6_K", "OWN"),
        custom=(own,),
        calibration="text.txt",
        threads=1,
        jobs=2,
        chunks=3,
        card=CardOptions(languages=("ja",), namespace="me", repo="you/it"),
    )
    assert second == Options(
        model=str(here / "mine"),
        name="me/mine",
        recipes=DEFAULT_NAMES,  # Q2_K is one of them
        custom=(own,),
        threads=1,
        jobs=2,
        chunks=2,
        naming="model",
        evaluate=False,
        out=Path("elsewhere"),
        cmake_args=("-DA=1",),
        card=CardOptions(languages=("ja",), namespace="me"),
    )


def test_a_batch_asks_for_what_the_command_line_asks_for(here: Path) -> None:
    """Every key means the same in models.toml as in gemma-gguf.toml."""
    (here / "own").mkdir()
    (here / "mine.txt").write_text("text")
    plain, _, tables = EVERYTHING.partition("\n[recipe_sets]")
    assert read(f"models = ['{OPTIONS.model}']\n{plain}\n[recipe_sets]{tables}", here) == [OPTIONS]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jobs = 1", "models: field required"),
        ("models = []", "models: list should have at least 1 item after validation, not 0"),
        ("models = [1]", "models[1]: input should be a valid dictionary or instance of Entry"),
        ("[[models]]\nname = 'a/b'", "models[1].model: field required"),
        ("[[models]]\nmodel = 'demo'\nrecipe = ['Q4_0']", "models[1].recipe: unknown key; nearest: recipes"),
        ("[[models]]\nmodel = 'demo'\njobs = 0", "models[1].jobs: input should be greater than or equal to 1"),
        ("[[model]]\nmodel = 'demo'", "model: unknown key; nearest: models"),
        ("recipes = ['Q4_K_N']\nmodels = ['demo']", "recipes: unknown recipe 'Q4_K_N'. Nearest: Q4_K_S"),
        (
            "[[models]]\nmodel = 'demo'\nrecipes = ['Q4_K_N']",
            "models[1] (demo): recipes: unknown recipe 'Q4_K_N'. Nearest: Q4_K_S",
        ),
        (
            "calibration = 'technicl'\nmodels = ['demo']",
            "models[1] (demo): calibration: there is no calibration file or set called 'technicl'. Did you mean",
        ),
        ("[[models]]\nmodel = 'demo'\nimatrix = 'i.gguf'", "models[1] (demo): imatrix: there is no file i.gguf."),
        ("[[models]]\nmodel = 'demo'\nbase = 'b.gguf'", "models[1] (demo): base: there is no file b.gguf."),
        (
            "[[models]]\nmodel = 'demo'\nreference = 'Q8_0'\nrecipes = ['Q4_0']",
            "models[1] (demo): reference: --from Q8_0 needs Q8_0 in the set",
        ),
        (
            "models = ['demo', 'a/b', 'demo']",
            "models[3] (demo): google_gemma-3-270m-GGUF is the set of models[1] (demo)",
        ),
        (
            "naming = 'model'\nmodels = ['google/gemma-3-1b-it', 'other/gemma-3-1b-it']",
            "models[2] (other/gemma-3-1b-it): gemma-3-1b-it-GGUF is the set of models[1] (google/gemma-3-1b-it)",
        ),
    ],
    ids=lambda value: value.replace("\n", " ")[:60],
)
def test_what_a_file_cannot_say(text: str, said: str, here: Path) -> None:
    with pytest.raises(BadInputError) as caught:
        read(text, here)
    assert caught.value.what.startswith("models.toml")
    assert said in caught.value.what


def test_all_problems_of_all_models_are_one_error_before_anything_is_made(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factory, "run", "no function")
    (here / "models.toml").write_text(
        "[[models]]\nmodel = 'a/b'\nrecipes = ['Q4_K_N']\ncalibration = 'x'\n[[models]]\nmodel = 'a/b'\nbase = 'c'\n"
    )
    done = call("batch", "models.toml", "--json")
    assert (done.exit_code, list(here.iterdir())) == (1, [here / "models.toml"])
    lines = json.loads(done.stdout)["error"].splitlines()
    assert lines[0] == "models.toml has 4 problems:"
    assert [re.sub(r"'.*", "", line) for line in lines[1:]] == [
        "  models[1] (a/b): recipes: unknown recipe ",
        "  models[1] (a/b): calibration: there is no calibration file or set called ",
        "  models[2] (a/b): base: there is no file c. Give --base the path of a GGUF file.",
        "  models[2] (a/b): a_b-GGUF is the set of models[1] (a/b) already",
    ]


def test_a_file_that_is_not_there(here: Path) -> None:
    done = call("batch", "models.toml")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "error: models.toml cannot be read: No such file or directory\n"


# --- room for all of them -----------------------------------------------------------------------------------------


def facts_of(*needs: Need) -> Facts:
    room = Room(Path("/o/out"), Path("/o"), 1, 1000, True)
    return Facts(rooms={"out": room, "cache": room}, needs=needs, compiler="c++", tools={"cmake": "cmake"})


def test_room_is_counted_for_all_models_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a proof takes goes again, what is built is built once; a model that cannot be made takes nothing."""
    build, broken = Need("build", "cache", 100, 100), doctor.Refused("model", BadInputError("broken"))
    by_model = {
        "a": facts_of(build, Need("quantize", "out", 400, 900), Need("proof", "out", 300, 300)),
        "b": replace(facts_of(build, Need("quantize", "out", 900, 900)), refused=(broken,)),
        "c": facts_of(build, Need("quantize", "out", 400, 900), Need("proof", "out", 100, 100)),
        "d": facts_of(build, Need("quantize", "out", 50, 90), Need("proof", "out", 60, 60)),
        "e": facts_of(build, Need("quantize", "out", 100, 900)),
    }
    monkeypatch.setattr(survey, "look", lambda options: by_model[options.model])
    found = batch.look([batch.Item(name, Options(name)) for name in by_model])
    assert [[(check.name, check.what) for check in checks] for checks in found] == [
        [],
        [("model", "broken")],
        [],
        [
            (
                "disk",
                "at least 110 bytes in /o/out, /o/out after the 900 of the models before it; 1,000 are free: "
                "10 are missing",
            )
        ],
        [],
    ]


# --- the runs -----------------------------------------------------------------------------------------------------


def test_a_run_that_fails_ends_its_model_alone(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error of ours, and a bug: both are in the summary, and the next model is made."""

    def run(options: Options, *, say: Any, **_: Any) -> Report:
        say(Done("convert", "base", False, "unchanged", 0.0, 7))
        if options.model == "a/b":
            raise ToolFailedError("it broke", next_step="Mend it.", log=here / "run.log")
        if options.model == "c/d":
            raise ZeroDivisionError("a bug")
        say(Done("quantize", "file", True, "not made yet", 1.0, 5))
        return Report(here, here / "run.log", "fanout")

    monkeypatch.setattr(factory, "run", run)
    monkeypatch.setattr(batch, "look", lambda items: [()] * len(items))
    (here / "models.toml").write_text("models = ['a/b', 'c/d', 'e/f']")
    done = call("batch", "models.toml", "--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert (told["ok"], told["complete"], told["failed"]) == (False, 1, 2)
    a, c, e = told["models"]
    assert (a["complete"], a["error"], a["next_step"], a["log"]) == (False, "it broke", "Mend it.", f"{here}/run.log")
    assert (c["complete"], c["error"]) == (False, "ZeroDivisionError: a bug")
    assert "Traceback" in c["trace"]
    assert (e["complete"], e["error"], e["made"], e["kept"], e["n_bytes"]) == (True, None, 1, 1, 12)
    assert e["set_dir"] == str(here / "out" / "e_f-GGUF")
    assert "[3/3] e/f" in done.stderr
    assert "failed a/b: it broke\nnext:  Mend it.\nlog:   run.log\n" in done.stderr
    assert re.search(r"^c/d +FAILED +0 +1 .* ZeroDivisionError: a bug *$", done.stderr, re.MULTILINE)
    assert "1 of 3 sets complete" in done.stderr


def test_ctrl_c_ends_the_batch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def run(options: Options, **_: Any) -> Report:
        seen.append(options.model)
        raise KeyboardInterrupt

    monkeypatch.setattr(factory, "run", run)
    monkeypatch.setattr(batch, "look", lambda items: [()] * len(items))
    (here / "models.toml").write_text("models = ['a/b', 'c/d']")
    assert call("batch", "models.toml").exit_code == 130
    assert seen == ["a/b"]


def test_check_makes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "run", "no function")
    no_room = Check("disk", "fail", "it does not fit", "Make room.")
    monkeypatch.setattr(batch, "look", lambda items: [(), (no_room,)])
    (here / "models.toml").write_text("recipes = ['Q4_0']\nmodels = ['a/b', 'c/d']")
    done = call("batch", "models.toml", "--check", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout) == {
        "batch": "models.toml",
        "ok": False,
        "models": [
            {"model": "a/b", "set_dir": f"{here}/out/a_b-GGUF", "recipes": ["Q4_0"], "problems": []},
            {
                "model": "c/d",
                "set_dir": f"{here}/out/c_d-GGUF",
                "recipes": ["Q4_0"],
                "problems": [
                    {"check": "disk", "status": "fail", "what": "it does not fit", "next_step": "Make room."},
                ],
            },
        ],
    }
    assert "c/d: disk: it does not fit\nnext:  Make room.\n1 of 2 models cannot be made as things are.\n" in done.stderr


def test_three_models_one_of_them_broken(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two whole sets, a clear report, exit code 1; the same command keeps them, and makes the third once mended."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("first", "broken", "last"), start=1):
        checkpoints.write_gemma3_text(tmp_path / name, seed=seed, layers=1)
    shard = tmp_path / "broken" / "model-00002-of-00002.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-2] + np.uint16(0x7FC0).tobytes())  # its last weight is NaN
    (tmp_path / "models.toml").write_text(
        """
        recipes = ["pair"]
        naming = "model"
        namespace = "me"
        chunks = 2
        evaluate = false
        models = ["first", "broken", "last"]
        [recipe_sets]
        pair = ["Q4_0", "Q4_0_DOWN8"]
        [[custom_recipes]]
        name = "Q4_0_DOWN8"
        ftype = "Q4_0"
        tensor_types = ["ffn_down=q8_0"]
        """
    )
    done = call("batch", "models.toml", "--json")
    assert done.exit_code == 1, done.stderr
    told = json.loads(done.stdout)
    assert [(model["model"], model["complete"], model["made"] > 0) for model in told["models"]] == [
        ("first", True, True),
        ("broken", False, False),
        ("last", True, True),
    ]
    assert "NaN" in told["models"][1]["error"]
    assert Path(told["models"][1]["log"]).is_file()
    assert "2 of 3 sets complete" in done.stderr
    for name in ("first", "last"):
        directory = tmp_path / "out" / f"{name}-GGUF"
        assert {result.problem for result in proof.verify_set(directory)} == {None}
        assert {path.name for path in directory.glob("*.gguf")} == {
            f"{name}-{part}.gguf" for part in ("Q4_0", "Q4_0_DOWN8", "imatrix")
        }
        assert f"me/{name}-GGUF" in (directory / "README.md").read_text()
    assert not list((tmp_path / "out" / "broken-GGUF").glob("*.gguf"))

    shard.write_bytes(good)
    done = call("batch", "models.toml", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert [(model["made"], model["kept"]) for model in told["models"]] == [(0, 4), (4, 0), (0, 4)]
    assert manifest.load(tmp_path / "out" / "broken-GGUF").recipes == ["Q4_0", "Q4_0_DOWN8"]
