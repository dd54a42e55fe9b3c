"""The import hook, with stand-ins for transformers and for the model, which take seconds to import."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from transformers import AutoConfig

import d2svse.registration

REGISTER = "from d2svse.registration import register_when_transformers_is_loaded as r; r()"
MODEL = "from transformers.models.auto.modeling_auto import AutoModel; AutoModel.append('d2svse')"
PACKAGES = {
    "transformers/__init__.py": "",
    "transformers/utils.py": "import transformers.models.auto.configuration_auto",
    "transformers/models/__init__.py": "",
    "transformers/models/auto/__init__.py": "",
    "transformers/models/auto/configuration_auto.py": "",
    "transformers/models/auto/modeling_auto.py": "import transformers.utils\nAutoModel = []",
    "d2svse/__init__.py": REGISTER,
    "d2svse/models/__init__.py": "import d2svse.models.modeling",
    "d2svse/models/modeling.py": MODEL,
}
KNOWN = "from transformers.models.auto.modeling_auto import AutoModel; assert AutoModel == ['d2svse'], AutoModel\n"
POST_IMPORT_HOOK = """
import importlib.util, sys
class Finder:  # as wrapt and MLflow have it
    asking, seen = set(), []
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] != "transformers" or name in self.asking:
            return None
        self.asking.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking.remove(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            self.seen.append(name)
        spec.loader.exec_module = exec_module
        return spec
"""
# T1 imports transformers.utils; T2 has modeling_auto by half and waits for utils, while T1's end needs modeling_auto
THREADS = """
import sys, threading, time, gate
import d2svse
errors = []
def bring(name, after):
    after.wait(30)
    try:
        __import__(name)
    except BaseException as error:
        errors.append(f"{name}: {error!r}")
names = ["transformers.utils", "transformers.models.auto.modeling_auto"]
now = threading.Event()
now.set()
threads = [threading.Thread(target=bring, args=pair) for pair in zip(names, [now, gate.first])]
[thread.start() for thread in threads]
[thread.join(60) for thread in threads]
assert not errors, errors
assert not any(thread.is_alive() for thread in threads)
"""
GATE = """
import threading, time
first, second = threading.Event(), threading.Event()
def hold():
    first.set()
    second.wait(30)
    time.sleep(0.3)  # the other thread stands before the lock by now
"""


@pytest.fixture
def run(tmp_path):
    """Run code in a fresh process that finds the stand-ins; returns what it printed and its warnings."""
    for name, code in PACKAGES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{code}\n")
    shutil.copy(d2svse.registration.__file__, tmp_path / "d2svse")

    def run(code, *folders):
        path = os.pathsep.join(map(str, folders or [tmp_path]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/", timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.parametrize(
    "code",
    [
        "import d2svse\n",
        "import transformers\nimport d2svse\n",
        "import transformers.utils\nimport d2svse\n",
        "import transformers.models.auto.modeling_auto\nimport d2svse\n",
        "import d2svse\nimport d2svse.models\n",
        "import d2svse.models\n",
        "import d2svse, importlib\nimportlib.reload(d2svse)\n",
        "import d2svse, importlib\nimportlib.reload(d2svse.registration)\nimportlib.reload(d2svse)\n",
        "import d2svse, importlib.util\nassert importlib.util.find_spec('transformers.utils').loader.get_code\n",
    ],
)
def test_the_model_is_known_whatever_is_imported_first(run, code):
    assert run(code + KNOWN) == ""


def test_nothing_is_imported_before_it_is_asked_for(run):
    names = "[name for name in sys.modules if name.startswith(('transformers', 'd2svse.models'))]"
    assert run(f"import sys, d2svse, json; print({names})") == "[]\n"


@pytest.mark.parametrize("first", ["", "import d2svse\n"], ids=["before", "after"])
def test_the_import_hooks_of_others_are_called(run, first):
    code = f"{first}{POST_IMPORT_HOOK}\nsys.meta_path.insert(0, Finder())\nimport d2svse\n{KNOWN}"
    run(code + "assert 'transformers.models.auto.modeling_auto' in Finder.seen, Finder.seen")


def test_a_finder_of_its_own_is_followed(run, tmp_path):
    """An editable install finds by a mapping what is not on the path."""
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "transformers", tmp_path / "elsewhere")
    finder = f"""
import sys
from importlib.util import spec_from_file_location
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        file = {str(tmp_path / "elsewhere")!r} + "/" + name.replace(".", "/")
        for end in ("/__init__.py", ".py"):
            try:
                open(file + end).close()
            except OSError:
                continue
            return spec_from_file_location(name, file + end)
sys.meta_path.insert(0, Finder)
import d2svse
"""
    run(finder + KNOWN)


def test_a_loader_of_many_modules_is_left_as_it_is(run, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
        for name in [*PACKAGES, "d2svse/registration.py"]:
            file.write(tmp_path / name, name)
        file.writestr("other.py", "")
    check = """
import other, transformers
for module in (d2svse, d2svse.models, transformers, other):
    for loader in (module.__loader__, module.__spec__.loader):
        assert type(loader).__name__ == "zipimporter", loader
        assert "exec_module" not in vars(loader)
"""
    run(f"import d2svse\n{KNOWN}{check}", tmp_path / "all.zip")


def test_a_model_that_cannot_be_imported_is_a_warning_and_transformers_works(run, tmp_path):
    (tmp_path / "d2svse" / "models" / "modeling.py").write_text("raise ImportError('no torch here')\n")
    for first in ("import d2svse", "import transformers.utils, d2svse"):
        said = run(f"{first}\nfrom transformers.models.auto.modeling_auto import AutoModel\nimport transformers.utils")
        assert said.count("RuntimeWarning: transformers' Auto classes do not know the model of d2svse") == 1
        assert "ImportError: no torch here" in said
    failing = run("import d2svse\ntry:\n    from d2svse import models\nexcept ImportError as error: print(error)")
    assert "no torch here\n" in failing


def test_an_error_of_transformers_is_its_own_and_a_second_try_works(run, tmp_path):
    file = tmp_path / "transformers" / "models" / "auto" / "modeling_auto.py"
    file.write_text("import transformers.utils, sys\nif not hasattr(sys, 'a'): raise OSError('x')\nAutoModel = []\n")
    code = "try:\n    import transformers.models.auto.modeling_auto\nexcept OSError: pass\nelse: raise SystemExit(1)\n"
    assert "RuntimeWarning" not in run(f"import d2svse, sys\n{code}sys.a = 1\n{KNOWN}")


@pytest.mark.parametrize("when", ["before", "within"])
def test_two_threads_import_transformers_at_once(run, tmp_path, when):
    """The second thread begins before the first registers the model, or while it does."""
    (tmp_path / "gate.py").write_text(GATE)
    auto, models = tmp_path / "transformers" / "models" / "auto", tmp_path / "d2svse" / "models" / "modeling.py"
    waits = "import gate; gate.second.set()\n"
    (auto / "modeling_auto.py").write_text(waits + PACKAGES["transformers/models/auto/modeling_auto.py"])
    if when == "before":
        utils = tmp_path / "transformers" / "utils.py"
        utils.write_text(f"{PACKAGES['transformers/utils.py']}\nimport gate; gate.hold()\n")
    else:
        models.write_text(f"import gate; gate.hold()\n{MODEL}\n")
    assert run(THREADS + KNOWN) == ""


def test_the_hook_names_what_transformers_has():
    assert AutoConfig.__module__ == d2svse.registration.AUTO_CLASSES
