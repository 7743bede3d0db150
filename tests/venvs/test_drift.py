"""Drift: the code asks for other packages than an existing venv holds."""

from __future__ import annotations

import pytest
from sample_projects import Project, make_wheel, run_in

from nemo_rl import settings
from nemo_rl.errors import ConfigError, VenvDriftError
from nemo_rl.venvs import Store, ensure
from nemo_rl.venvs.ensure import differences

REFUSE, IGNORE, REBUILD = "refuse", "ignore", "rebuild"


def policy(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NEMO_RL_VENV_DRIFT", value)


def test_default_policy_is_rebuild_and_in_an_image_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMO_RL_VENV_DRIFT", raising=False)
    monkeypatch.delenv("NEMO_RL_CONTAINER", raising=False)
    assert settings.venv_drift() == REBUILD
    monkeypatch.setenv("NEMO_RL_CONTAINER", "1")
    assert settings.venv_drift() == REFUSE
    policy(monkeypatch, REBUILD)
    assert settings.venv_drift() == REBUILD
    policy(monkeypatch, "maybe")
    with pytest.raises(ConfigError, match="expected one of rebuild, refuse, ignore"):
        settings.venv_drift()


def test_refuse_lists_differing_packages_and_commands(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    command = project.command("--extra", "one")
    before = ensure(command, "worker")
    project.lock(alpha="2.0", beta="2.0")
    policy(monkeypatch, REFUSE)
    with pytest.raises(VenvDriftError) as caught:
        ensure(command, "worker")
    text = str(caught.value)
    assert "alpha 1.0 -> 2.0" in text
    assert "beta 1.0 -> 2.0" in text
    assert "gamma" not in text
    assert "export NEMO_RL_VENV_DRIFT=rebuild" in text
    assert "docker buildx build --target release" in text
    policy(monkeypatch, REBUILD)
    after = ensure(command, "worker")
    assert after.built
    assert after.digest != before.digest


def test_refuse_compares_a_new_name_with_its_spec(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure(project.command("--extra", "one"), "as-built-into-the-image")
    project.lock(alpha="2.0")
    policy(monkeypatch, REFUSE)
    with pytest.raises(VenvDriftError, match="alpha 1.0 -> 2.0"):
        ensure(project.command("--extra", "one"), "worker")


def test_refuse_accepts_equal_and_new_venvs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure(project.command("--extra", "one"), "worker")
    policy(monkeypatch, REFUSE)
    (project.root / "src" / "sample" / "__init__.py").write_text("CODE = 2\n")
    project.lock(delta="2.0")  # a package of another extra
    assert not ensure(project.command("--extra", "one"), "worker").built
    assert ensure(project.command("--extra", "two"), "other").built


def test_ignore_uses_the_existing_packages(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    command = project.command("--extra", "one")
    before = ensure(command, "worker")
    project.lock(alpha="2.0")
    policy(monkeypatch, IGNORE)
    used = ensure(command, "worker")
    assert (used.digest, used.built) == (before.digest, False)
    assert run_in(used.python, "import alpha; print(alpha.VERSION)") == "1.0"


@pytest.mark.parametrize("value", [REFUSE, IGNORE])
def test_force_overrides_the_policy(project: Project, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    command = project.command("--extra", "one")
    ensure(command, "worker")
    project.lock(alpha="2.0")
    policy(monkeypatch, value)
    monkeypatch.setenv("NRL_FORCE_REBUILD_VENVS", "true")
    assert run_in(ensure(command, "worker").python, "import alpha; print(alpha.VERSION)") == "2.0"


def test_refuse_compares_all_layers_of_an_additive_venv(
    project: Project, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    wheel = make_wheel(project.root / "own", "omega", "1.0")
    command = project.command("--with", f"'omega @ file://{wheel}'")
    ensure(command, "worker", store=store)
    project.lock(alpha="2.0")
    policy(monkeypatch, REFUSE)
    with pytest.raises(VenvDriftError) as caught:
        ensure(command, "worker", store=store)
    assert "alpha 1.0 -> 2.0" in str(caught.value)
    assert "omega" not in str(caught.value).partition(":\n")[2].partition("Either")[0]


def test_differences_of_added_removed_and_changed_packages() -> None:
    assert differences(["a==1", "b==1", "C_d @ x"], ["b==2", "c-d @ x", "e"]) == [
        "a 1 -> absent",
        "b 1 -> 2",
        "e absent -> (any version)",
    ]
