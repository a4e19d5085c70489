"""Versions of APIs in a store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cortex_dask.deployments import ApiVersions, pack_dependencies
from cortex_dask.errors import JobNotFoundError
from cortex_dask.io.store.store import Store
from cortex_dask.spec import resolution
from cortex_dask.spec.api import parse_api
from cortex_dask.spec.target import from_archive, from_class_spec, from_spec
from tests.support.projects import HANDLER, api_document, write_project


class ByClass:
    def __init__(self, config):
        self.config = config

    def handle_batch(self, payload):
        return payload


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path / "project")


def deploy(apis: ApiVersions, project: Path, **keys: Any) -> tuple[Any, str]:
    api = parse_api(api_document(**keys))
    return apis.add(api, from_spec(api, project))


class TestStore:
    def test_an_api_is_found_again_from_anywhere(self, store_url: str, project: Path) -> None:
        keys = {
            "handler": {"config": {"a": {"b": [1, "ü"]}}, "env": {"A": "1"}},
            "compute": {"cpu": "200m", "mem": "1Gi"},
        }
        job = {"input": "data/in", "batch_size": 7, "output": "out", "filters": [["x", ">", 5]], "workers": 3}
        made, change = deploy(ApiVersions(Store(store_url)), project, **keys, job=job)

        apis = ApiVersions(Store(store_url))
        assert (change, apis.names()) == ("created", ["tagger"])
        assert apis.get("tagger") == made
        found = apis.target("tagger")
        api = parse_api(api_document(**keys, job=job))
        packed = from_spec(api, project)
        assert (found.handler, found.config, found.compute) == (packed.handler, packed.config, packed.compute)
        assert (found.api_id, found.folder) == (packed.api_id, project)
        assert found.archive is not None
        assert packed.archive is not None
        assert (found.archive.hash, found.archive.data) == (packed.archive.hash, packed.archive.data)
        before, after = resolution.resolve(packed, job_id="j").settings, resolution.resolve(found, job_id="j").settings
        assert {**before.to_json(), "created_time": ""} == {**after.to_json(), "created_time": ""}
        assert after.dataset.paths == (str(project / "data/in"),)

    def test_the_same_again_changes_nothing(self, store_url: str, project: Path) -> None:
        store = Store(store_url)
        apis = ApiVersions(store)
        first, _ = deploy(apis, project)
        stored = {name: store.read(name) for name in store.names()}
        os.utime(project / "handler.py", (0, 0))

        again, change = deploy(apis, project)

        assert (again, change) == (first, "unchanged")
        assert {name: store.read(name) for name in store.names()} == stored

    def test_another_content_is_another_version(self, tmp_path: Path, project: Path) -> None:
        apis = ApiVersions(Store(str(tmp_path / "store")))
        first, _ = deploy(apis, project)
        (project / "handler.py").write_text(HANDLER + "\n")
        second, change = deploy(apis, project)
        third, _ = deploy(apis, project, handler={"config": {"a": 1}})
        (project / "handler.py").write_text(HANDLER)
        back, _ = deploy(apis, project)

        assert change == "updated"
        assert len({first.api_id, second.api_id, third.api_id}) == 3
        assert back.api_id == first.api_id
        assert [version["api_id"] for version in back.versions] == [first.api_id, third.api_id, second.api_id]
        assert back.created_time == first.created_time < back.updated_time
        assert apis.spec("tagger", third.api_id) is not None
        assert apis.spec("tagger", "0" * 16) is None

    def test_other_defaults_for_submissions_are_an_update_too(self, tmp_path: Path, project: Path) -> None:
        apis = ApiVersions(Store(str(tmp_path / "store")))
        deploy(apis, project, job={"input": "a"})
        _, change = deploy(apis, project, job={"input": "b"})

        assert change == "updated"
        assert resolution.resolve(apis.target("tagger")).settings.dataset.paths == (str(project / "b"),)

    def test_a_class_and_what_it_needs(self, store_url: str) -> None:
        apis = ApiVersions(Store(store_url))
        api = parse_api(api_document(handler={"env": {"A": "1"}, "log_level": "debug"}))
        made = from_class_spec(ByClass, api, pack_dependencies(["numpy<3"], ["conda-forge::zlib=1"]))
        apis.add(api, made)

        found = apis.target("tagger")
        assert (found.handler, found.pickled) == (made.handler, made.pickled)
        assert found.handler.kind == "class"
        assert found.handler.dependencies == {"pip": "requirements.txt", "conda": "conda-packages.txt"}
        assert (found.handler.env, found.handler.log_level) == ({"A": "1"}, "debug")
        other = parse_api(api_document(handler={"log_level": "error"}))
        patched = from_archive(other, found)
        assert patched.handler.log_level == "error"
        assert patched.handler.dependencies == found.handler.dependencies
        assert (patched.pickled, patched.archive) == (found.pickled, found.archive)
        assert patched.api_id != found.api_id

    def test_a_patched_project_is_the_same_archive(self, tmp_path: Path, project: Path) -> None:
        (project / ".env").write_text("A=1\n")
        (project / "link.py").symlink_to("handler.py")
        apis = ApiVersions(Store(str(tmp_path / "store")))
        deploy(apis, project)
        before = apis.target("tagger")

        after = from_archive(parse_api(api_document(handler={"config": {"a": 1}})), before)

        assert after.handler.project == before.handler.project
        assert after.api_id != before.api_id

    @pytest.mark.parametrize("keep_cache", [False, True])
    def test_delete(self, store_url: str, project: Path, keep_cache: bool) -> None:
        store = Store(store_url)
        apis = ApiVersions(store)
        made, _ = deploy(apis, project)
        deploy(apis, project, name="other")

        apis.remove("tagger", keep_cache=keep_cache)

        assert apis.names() == ["other"]
        assert apis.find("tagger") is None
        assert store.exists(f"apis/tagger/{made.api_id}/project.tar.gz") is keep_cache

    def test_an_unknown_name_names_the_known_ones(self, tmp_path: Path, project: Path) -> None:
        apis = ApiVersions(Store(str(tmp_path / "store")))
        with pytest.raises(JobNotFoundError, match=r"no API 'x' is deployed in .*/store; deployed there: none"):
            apis.get("x")
        deploy(apis, project)
        with pytest.raises(JobNotFoundError, match="did you mean tagger"):
            apis.target("tager")

    def test_a_damaged_api_says_what_to_do(self, tmp_path: Path, project: Path) -> None:
        apis = ApiVersions(Store(str(tmp_path / "store")))
        made, _ = deploy(apis, project)
        (tmp_path / "store/apis/tagger" / made.api_id / "version.json").unlink()
        with pytest.raises(JobNotFoundError, match=r"version\.json is missing; deploy it again"):
            apis.get("tagger")
