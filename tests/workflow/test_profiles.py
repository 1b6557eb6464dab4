"""Each profile plans the whole workflow with its real executor plugin, and places every rule."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support.workflow import REPOSITORY, Workflow, make_workflow, rule_texts

from stillhouse.config.resources import ResourceSettings

PLUGINS = {
    "default": (),
    "slurm": ("snakemake_executor_plugin_slurm",),
    "kubernetes": ("snakemake_executor_plugin_kubernetes", "snakemake_storage_plugin_s3"),
}
# The default configuration runs all five studies, but no teacher that is trained itself.
NOT_BY_DEFAULT = {"context_distillation_task_teacher"}
EMPTY_BUCKET = b"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>"


def profile(name: str) -> dict[str, Any]:
    """A profile's settings."""
    return yaml.safe_load((REPOSITORY / "profiles" / name / "config.yaml").read_text())


@pytest.fixture
def empty_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An S3 endpoint on this machine in whose bucket there is nothing yet."""

    class Bucket(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(EMPTY_BUCKET)))
            self.end_headers()
            self.wfile.write(EMPTY_BUCKET)

        def log_message(self, format: str, *arguments: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SNAKEMAKE_STORAGE_S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("ACCESS_KEY", "SECRET_KEY"):
        monkeypatch.setenv(f"SNAKEMAKE_STORAGE_S3_{name}", "none")
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.usefixtures("empty_bucket")
@pytest.mark.parametrize("name", PLUGINS)
def test_a_dry_run_under_each_profile_plans_everything(name: str, tiny_model: Path, tmp_path: Path) -> None:
    for plugin in PLUGINS[name]:
        pytest.importorskip(plugin, reason=f"{plugin} is not installed: pip install --no-deps -r envs/cluster.txt")
    workflow: Workflow = make_workflow(tmp_path / "project", tiny_model)
    planned = workflow.planned("--workflow-profile", f"profiles/{name}", config="config/config.yaml")
    assert planned.keys() == rule_texts().keys() - NOT_BY_DEFAULT


@pytest.mark.slow
@pytest.mark.parametrize("look", [("--unlock",), ("--dag", "mermaid-js"), ("--detailed-summary",)])
def test_what_starts_no_job_is_told_of_no_cores(look: tuple[str, ...], tiny_model: Path, tmp_path: Path) -> None:
    make_workflow(tmp_path / "project", tiny_model).run(*look, cores=None)


def test_on_slurm_gpu_jobs_go_to_the_gpu_partition_and_all_others_share_submissions() -> None:
    settings = profile("slurm")
    gpu_rules = {name for name, text in rule_texts().items() if re.search(r"^ +gpu=", text, re.MULTILINE)}
    assert gpu_rules, "no rule asks for a GPU"
    assert settings["set-resources"].keys() == gpu_rules
    assert settings["groups"].keys() == rule_texts().keys() - gpu_rules


def test_on_slurm_the_small_jobs_of_a_submission_fit_a_node_of_eight_processors_side_by_side() -> None:
    settings = profile("slurm")
    for group, count in settings["group-components"].items():
        for rule in (rule for rule, its_group in settings["groups"].items() if its_group == group):
            [threads] = re.findall(r"^ +threads: (\S+)$", rule_texts()[rule], re.MULTILINE)
            one = ResourceSettings().assets.threads if threads == "RESOURCES.assets.threads" else int(threads)
            assert count * one <= 8, f"{count} x {rule}"


@pytest.mark.parametrize("installed", ["gpu", "cpu"])
def test_make_keeps_to_the_environment_that_was_installed(installed: str, tmp_path: Path) -> None:
    """`make status` after an update, say, on a login node without a GPU."""
    (tmp_path / "installed").write_text(f"{installed}\n")
    command = ["make", "--dry-run", f"VENV={tmp_path}", "--what-if", "pyproject.toml", f"{tmp_path}/installed"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert f"--no-compile -r envs/{installed}.txt" in done.stdout


def test_every_rule_says_how_much_memory_and_time_it_needs() -> None:
    for name, text in rule_texts().items():
        for resource in ("mem_mb", "runtime"):
            assert re.search(rf"^ +{resource}=", text, re.MULTILINE), f"rule {name} has no {resource}"


def test_on_kubernetes_a_pod_s_limits_equal_its_requests() -> None:
    reason = "the Kubernetes plugin is not installed: pip install --no-deps -r envs/cluster.txt"
    plugin = pytest.importorskip("snakemake_executor_plugin_kubernetes", reason=reason)
    settings, submitted = profile("kubernetes"), list[Any]()
    executor = plugin.Executor.__new__(plugin.Executor)
    executor.__dict__ |= {
        "run_namespace": "run",
        "namespace": "default",
        "container_image": settings["container-image"],
        "k8s_cpu_scalar": settings["kubernetes-cpu-scalar"],
        "k8s_service_account_name": None,
        "persistent_volumes": plugin.parse_persistent_volumes([settings["kubernetes-persistent-volumes"]]),
        "privileged": False,
        "secret_envvars": {},
        "logger": SimpleNamespace(debug=lambda text: None, info=lambda text: None),
        "batchapi": SimpleNamespace(create_namespaced_job=lambda namespace, body: submitted.append(body)),
        "format_job_exec": lambda job: "true",
        "report_job_submission": lambda info: None,
        "_kubernetes_retry": lambda call: call(),
    }
    asked = {"gpu": 2, "mem_mb": 64000, "_cores": 8}
    job = SimpleNamespace(
        jobid=1, attempt=1, is_containerized=False, resources={**settings["default-resources"], **asked}
    )
    executor.run_job(job)
    [container] = submitted[0].spec.template.spec.containers
    assert container.resources.limits == container.resources.requests
    assert container.resources.limits["nvidia.com/gpu"] == "2"
    assert container.resources.limits["memory"] == "64000M"
    claim = yaml.safe_load((REPOSITORY / "profiles/kubernetes/work-claim.yaml").read_text())
    assert {"work": claim["metadata"]["name"]} == {
        Path(mount.mount_path).name: mount.name for mount in container.volume_mounts if mount.mount_path != "/workdir"
    }
