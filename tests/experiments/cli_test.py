"""What only a process shows: signals, kills, full disks. Usage: cli_test.py build/retain"""

import json
import pathlib
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import unittest

RETAIN = sys.argv.pop(1) if len(sys.argv) > 1 else "build/retain"
PATIENCE = 120  # seconds; never reached on a machine that works

TINY = ["--world", "recall", "--horizon", "40", "--core", "mamba", "--d_model", "8", "--d_state", "4", "--num_envs", "8",
        "--threads", "1"]


def run(*arguments, **options):
    return subprocess.run([RETAIN, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE, **options)


def start(*arguments):
    return subprocess.Popen([RETAIN, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def updates_done(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_until(process, condition):
    end = time.monotonic() + PATIENCE
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def wait_for_updates(process, folder, updates):
    wait_until(process, lambda: updates_done(folder) >= updates)


class Cli(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory(prefix="retain-cli-")))

    def assert_identical(self, a, b):
        for name in ("checkpoint.h5", "run.h5"):
            same = run("compare", a / name, b / name)
            self.assertEqual(same.returncode, 0, same.stdout + same.stderr)

    def kill_and_resume(self, mode, seed):
        chance = random.Random(seed)
        whole, killed = self.folder / "whole", self.folder / "killed"
        options = [*TINY, *mode, "--updates", 60]
        self.assertEqual(run("train", *options, "--out", whole).returncode, 0)
        kills = 0
        for _ in range(3):
            process = start("train", *options, "--checkpoint_every", chance.randint(1, 4), "--out", killed, "--resume")
            wait_for_updates(process, killed, updates_done(killed) + chance.randint(1, 12))
            time.sleep(chance.random() * 0.02)
            process.kill()
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
        self.assertGreaterEqual(kills, 2)
        last = run("train", "--out", killed, "--resume")  # its folder knows the options
        self.assertEqual(last.returncode, 0, last.stderr)
        self.assert_identical(whole, killed)
        rows = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
        self.assertEqual([row["update"] for row in rows], list(range(1, 61)))

    def test_a_killed_run_of_whole_episodes_resumes_bit_equal(self):
        self.kill_and_resume([], seed=1)

    def test_a_killed_run_of_chunks_resumes_bit_equal(self):
        self.kill_and_resume(["--num_steps", 16], seed=2)

    def test_a_killed_run_with_more_updates_than_before_keeps_them(self):
        out = self.folder / "run"
        self.assertEqual(run("train", *TINY, "--updates", 2, "--out", out).returncode, 0)
        process = start("train", "--out", out, "--resume", "--updates", 1000000, "--checkpoint_every", 1000000)
        wait_for_updates(process, out, 50)
        process.kill()
        process.communicate()
        process = start("train", "--out", out, "--resume")
        wait_until(process, lambda: updates_done(out) < 50)  # back at the checkpoint's two
        wait_for_updates(process, out, 4)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
        self.assertEqual(process.returncode, 143)
        self.assertIn("updates = 1000000\n", (out / "config.ini").read_text())

    def test_a_signal_saves_and_exits_cleanly(self):
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with self.subTest(signal=number.name):
                out = self.folder / number.name
                process = start("train", *TINY, "--updates", 1000000, "--checkpoint_every", 1000000, "--out", out)
                wait_for_updates(process, out, 3)
                process.send_signal(number)
                _, error = process.communicate(timeout=PATIENCE)
                self.assertEqual(process.returncode, code)
                done = updates_done(out)
                self.assertIn(f"retain train: stopped after update {done};", error.splitlines()[-1])
                resumed = run("train", "--out", out, "--resume", "--updates", done + 1)
                self.assertEqual(resumed.returncode, 0, resumed.stderr)
                self.assertEqual(updates_done(out), done + 1)

    def test_two_processes_do_not_train_in_one_folder(self):
        out = self.folder / "run"
        process = start("train", *TINY, "--updates", 1000000, "--out", out)
        wait_for_updates(process, out, 1)
        second = run("train", "--out", out, "--resume")
        process.kill()
        process.communicate()
        self.assertEqual(second.returncode, 2)
        self.assertIn("another process is training there", second.stderr)

    def test_a_full_disk_leaves_the_old_checkpoint(self):
        out = self.folder / "run"
        self.assertEqual(run("train", *TINY, "--updates", 2, "--out", out).returncode, 0)
        before = (out / "checkpoint.h5").read_bytes()

        def no_room():  # a file may not grow to the size of the checkpoint
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

        full = run("train", "--out", out, "--resume", "--updates", 4, preexec_fn=no_room, restore_signals=False)
        self.assertEqual(full.returncode, 1, full.stderr)
        self.assertIn("checkpoint.h5", full.stderr.splitlines()[-1])
        self.assertEqual((out / "checkpoint.h5").read_bytes(), before)
        self.assertEqual(sorted(path.name for path in out.iterdir()),
                         ["checkpoint.h5", "config.ini", "metrics.jsonl", "run.h5"])
        self.assertEqual(run("train", "--out", out, "--resume", "--updates", 4).returncode, 0)

    def test_a_closed_output_is_an_error(self):
        with open("/dev/full", "w") as full:
            listed = subprocess.run([RETAIN, "worlds"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
        self.assertEqual(listed.returncode, 1)
        self.assertIn("cannot write to the standard output", listed.stderr)

    def test_a_folder_that_cannot_be_made_is_named(self):
        (self.folder / "file").write_text("")
        failed = run("train", *TINY, "--out", self.folder / "file" / "run")
        self.assertEqual(failed.returncode, 2)
        self.assertRegex(failed.stderr, r"\Aretain train: --out .*cannot make the folder: .*\n\Z")


if __name__ == "__main__":
    unittest.main()
