import errno
import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from realm_fast import checkpoint as ck
from realm_fast import optim
from realm_fast.config import Config, load_config
from realm_fast.errors import ConfigError, CorruptArtifactError, DataError, DiskFullError, ProvenanceError
from realm_fast.files import STAGING_PREFIX


class Net(nn.Module):
    """Saves itself as the package's models do."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width)

    def forward(self, x):
        return self.LayerNorm(torch.tanh(self.dense(x)))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        save_file(self.state_dict(), str(folder / "model.safetensors"))

    @classmethod
    def load(cls, folder: Path) -> "Net":
        net = cls()
        net.load_state_dict(load_file(str(folder / "model.safetensors")))
        return net


def trained(steps: int = 3, seed: int = 0):
    torch.manual_seed(seed)
    net = Net()
    optimizer = optim.build_optimizer({"net": (net, 1e-2)}, weight_decay=0.01)
    for step in range(1, steps + 1):
        update(net, optimizer, step)
    return net, optimizer


def update(net, optimizer, step: int) -> float:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    optim.set_learning_rates(optimizer, step, warmup_steps=2, total_steps=20)
    loss = (net(x) * x).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def save(folder, step, net, optimizer, *, keep=2, identity=None, state=None):
    return ck.save_checkpoint(
        folder,
        step,
        modules={"net": net},
        optimizer=optimizer,
        state=state or {"skipped": 3},
        identity=identity or {"seed": 0},
        keep=keep,
    )


def restore(checkpoint):
    net = Net.load(checkpoint.module_folder("net"))
    optimizer = optim.build_optimizer({"net": (net, 1e-2)}, weight_decay=0.01)
    checkpoint.load_optimizer(optimizer)
    return net, optimizer


def test_round_trip_is_bit_exact_and_training_goes_on_the_same(tmp_path):
    net, optimizer = trained(3)
    with torch.no_grad():  # denormals and signed zeros must survive too
        optimizer.state[net.dense.bias]["exp_avg"][:3] = torch.tensor([1e-45, -0.0, 1e-39])
    save(tmp_path, 3, net, optimizer)
    checkpoint = ck.newest_checkpoint(tmp_path)
    assert checkpoint.step == 3
    assert checkpoint.state == {"skipped": 3}
    again, optimizer_again = restore(checkpoint)
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert (
            optimizer.state[a].keys() == optimizer_again.state[b].keys() == {"step", "exp_avg", "exp_avg_sq"}
        )
        for key, value in optimizer.state[a].items():
            other = optimizer_again.state[b][key]
            assert value.dtype == other.dtype
            assert torch.equal(value.reshape(-1).view(torch.int32), other.reshape(-1).view(torch.int32))
    for step in range(4, 9):
        assert update(net, optimizer, step) == update(again, optimizer_again, step)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_before_the_first_update_there_is_no_optimizer_state(tmp_path):
    save(tmp_path, 0, *trained(0))
    net, optimizer = restore(ck.newest_checkpoint(tmp_path))
    assert not optimizer.state
    update(net, optimizer, 1)


def test_latest_json_and_pruning(tmp_path):
    net, optimizer = trained()
    for step in (100, 200, 300):
        save(tmp_path, step, net, optimizer)
    assert ck.checkpoint_steps(tmp_path) == [200, 300]
    assert json.loads((tmp_path / "latest.json").read_text()) == {"name": "step-00000300"}
    ck.save_checkpoint(
        tmp_path, 400, modules={}, optimizer=None, state={}, identity={}, keep=1, protect=[200]
    )
    assert ck.checkpoint_steps(tmp_path) == [200, 400]
    assert not list(tmp_path.glob(STAGING_PREFIX + "*"))
    with pytest.raises(ValueError, match="keep: expected >= 1"):
        ck.prune_checkpoints(tmp_path, 0)


def test_no_folder_or_an_empty_one_holds_no_checkpoint(tmp_path):
    assert ck.newest_checkpoint(tmp_path / "absent") is None
    assert ck.newest_checkpoint(tmp_path) is None
    ck.clean_checkpoints(tmp_path / "absent")


def test_leftovers_are_ignored_and_cleaned(tmp_path):
    save(tmp_path, 5, *trained())
    leftover = tmp_path / f"{STAGING_PREFIX}step-00000009.x"
    leftover.mkdir()
    (leftover / "state.json").write_text("{}")
    assert ck.newest_checkpoint(tmp_path).step == 5
    assert leftover.exists()  # reading cleans nothing: another process may be writing
    ck.clean_checkpoints(tmp_path)
    assert not leftover.exists()


@pytest.mark.parametrize("harm", ["truncate", "delete", "no_state"])
def test_an_incomplete_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, harm):
    net, optimizer = trained()
    save(tmp_path, 1, net, optimizer)
    newer = save(tmp_path, 2, net, optimizer)
    victim = newer / ("state.json" if harm == "no_state" else "net/model.safetensors")
    if harm == "truncate":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        victim.unlink()
    assert ck.newest_checkpoint(tmp_path).step == 1
    assert "passing over checkpoint 2" in caplog.text
    assert str(victim) in caplog.text


@pytest.mark.parametrize("name", ["net/model.safetensors", "optimizer.safetensors"])
def test_a_flipped_bit_is_refused_by_name(tmp_path, name):
    path = save(tmp_path, 1, *trained())
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=f"{name}: not as it was written"):
        restore(ck.newest_checkpoint(tmp_path))


def test_another_format_version_is_not_guessed_at(tmp_path):
    path = save(tmp_path, 1, *trained())
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**record, "format_version": 99}))
    with pytest.raises(DataError, match="checkpoint format 99"):
        ck.read_checkpoint(path)
    with pytest.raises(DataError, match="no such checkpoint"):
        ck.read_checkpoint(tmp_path / "step-00000044")


def test_a_missing_module_is_named(tmp_path):
    save(tmp_path, 1, *trained())
    with pytest.raises(DataError, match="holds no reader, only net"):
        ck.newest_checkpoint(tmp_path).module_folder("reader")


def test_identity_mismatch_names_both_sides(tmp_path):
    config = load_config(None, ["pretrain.steps=500"])
    identity = ck.identity_of(config, ["pretrain"], corpus_hash="aaa")
    save(tmp_path, 1, *trained(), identity=identity)
    checkpoint = ck.newest_checkpoint(tmp_path)
    checkpoint.check_identity(identity)
    free = load_config(None, ["pretrain.steps=500", "pretrain.log_every_steps=3", "device=cuda"])
    checkpoint.check_identity(ck.identity_of(free, ["pretrain"], corpus_hash="aaa"))
    other = load_config(None, ["pretrain.steps=600", "seed=4"])
    with pytest.raises(ConfigError) as caught:
        checkpoint.check_identity(ck.identity_of(other, ["pretrain"], corpus_hash="bbb"))
    message = str(caught.value)
    assert "pretrain.steps: the checkpoint has 500, now it is 600" in message
    assert "seed: the checkpoint has 0, now it is 4" in message
    assert "corpus_hash: the checkpoint has 'aaa', now it is 'bbb'" in message
    assert "reader_lr" not in message


def test_free_settings_exist():
    known = set(ck.identity_of(Config(), [])) | {
        name for section in Config().to_dict() for name in _names(Config().to_dict()[section], section)
    }
    assert known >= ck.FREE_SETTINGS


def _names(value, prefix):
    return [f"{prefix}.{name}" for name in value] if isinstance(value, dict) else [prefix]


def test_optimizer_of_another_model_is_refused(tmp_path):
    save(tmp_path, 1, *trained())
    checkpoint = ck.newest_checkpoint(tmp_path)
    other = optim.build_optimizer({"other": (Net(), 1e-2)}, weight_decay=0.01)
    with pytest.raises(ProvenanceError, match=r"4 parameters, the models here have 4; they differ in"):
        checkpoint.load_optimizer(other)
    wider = optim.build_optimizer({"net": (Net(6), 1e-2)}, weight_decay=0.01)
    with pytest.raises(ProvenanceError, match=r"is \[5, 5\], the parameter is \[6, 6\]"):
        checkpoint.load_optimizer(wider)


def test_the_same_step_again_replaces_the_checkpoint(tmp_path):
    save(tmp_path, 1, *trained(), state={"n": 1})
    save(tmp_path, 1, *trained(), state={"n": 2})
    assert ck.newest_checkpoint(tmp_path).state == {"n": 2}
    assert not list(tmp_path.glob(STAGING_PREFIX + "*"))


class FullDisk(Net):
    def save(self, folder: Path) -> None:
        super().save(folder)
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("step", [1, 2])  # 1: even the checkpoint that was to be replaced survives
def test_a_full_disk_leaves_the_older_checkpoint_and_says_so(tmp_path, step):
    net, optimizer = trained()
    save(tmp_path, 1, net, optimizer)
    with pytest.raises(DiskFullError, match="no space left to write it"):
        save(tmp_path, step, FullDisk(), optimizer)
    assert ck.newest_checkpoint(tmp_path).step == 1
    restore(ck.newest_checkpoint(tmp_path))
    assert not list(tmp_path.glob(STAGING_PREFIX + "*"))


def test_a_failed_replacement_puts_the_old_one_back(tmp_path, monkeypatch):
    net, optimizer = trained()
    path = save(tmp_path, 1, net, optimizer)
    real = os.rename

    def rename(source, target):
        if Path(target) == path and "step-00000001." in str(source):  # the staged new one
            raise OSError(errno.ENOSPC, "no space")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(DiskFullError):
        save(tmp_path, 1, net, optimizer, state={"n": 2})
    assert ck.newest_checkpoint(tmp_path).state == {"skipped": 3}


def test_sigkill_at_random_moments_never_leaves_a_torn_checkpoint(tmp_path):
    net, optimizer = trained()
    moments = random.Random(0)
    reached = 0
    for kill in range(200):
        if kill >= 12 and reached >= 3:
            break
        child = os.fork()
        if child == 0:
            try:
                for step in itertools.count(reached + 1):
                    save(tmp_path, step, net, optimizer, keep=2, state={"step": step})
            finally:
                os._exit(1)  # never back into the test run
        time.sleep(moments.uniform(0.01, 0.08))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        checkpoint = ck.newest_checkpoint(tmp_path)
        if checkpoint is not None:
            assert checkpoint.step >= reached
            assert checkpoint.state == {"step": checkpoint.step}
            checkpoint.verify()
            restore(checkpoint)
            reached = checkpoint.step
        ck.clean_checkpoints(tmp_path)
    assert reached >= 3
    save(tmp_path, reached + 1, net, optimizer)  # prunes what the kills kept it from pruning
    assert ck.checkpoint_steps(tmp_path) == [reached, reached + 1]
