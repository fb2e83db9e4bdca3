"""A study on disk, small enough to be provisioned in a moment."""

import zipfile
from datetime import UTC, datetime, timedelta

from fedseg.coordinator.provision import provision

NOW = datetime.now(UTC).replace(microsecond=0)
EXPERIMENT = """
name = "tiny"
task = { name = "phantom", modality = "mr", labels = { background = 0, liver = 1 } }
model = { name = "unet", options = { widths = [4, 8] } }
training = { patch_size = [16, 16, 16] }
federation = { rounds = 2 }
"""
STUDY = """
name = "liver"
experiment = "experiment.toml"
[coordinator]
host = "localhost"
port = 8443
names = ["127.0.0.1", "::1", "fl-backup.example.org"]
organisation = "University Hospital"
"""


class Studies:
    """A folder with a study file, and the kits made from it."""

    def __init__(self, folder):
        self.folder, self.file, self.kits, self.app = folder, folder / "study.toml", folder / "kits", folder / "a.fab"
        self.now = NOW
        (folder / "experiment.toml").write_text(EXPERIMENT)
        with zipfile.ZipFile(self.app, "w") as bundle:
            bundle.writestr(zipfile.ZipInfo("client/app.py"), "app = 1\n")  # the same bytes whenever

    def write(self, *sites, study=STUDY, **settings):
        """Write the study file; a site is a name or a dictionary."""
        for key, value in settings.items():
            old = next(line for line in study.splitlines() if line.startswith(f"{key} ="))
            study = study.replace(old, f"{key} = {value}")
        entries = [{"name": site} if isinstance(site, str) else site for site in sites]
        tables = ["[[sites]]\n" + "".join(f'{key} = "{value}"\n' for key, value in site.items()) for site in entries]
        self.file.write_text(study + "".join(tables))

    def provision(self, *sites, days=0, app=None, **options):
        """Provision, some days after the first time."""
        if sites:
            self.write(*sites)
        app = app or (None if (self.kits / "coordinator").exists() else self.app)
        return provision(self.file, self.kits, now=self.now + timedelta(days=days), app=app, **options)

    def site(self, name):
        """A site's kit."""
        return self.kits / "sites" / name

    @property
    def coordinator(self):
        """The coordinator's kit."""
        return self.kits / "coordinator"


def contents(folder):
    """All files in a folder, with their modes and bytes."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
