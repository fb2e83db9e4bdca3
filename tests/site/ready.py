"""A hospital that has done everything right: kit, data, site file, approved bundle."""

from fedseg.data.phantom import PhantomConfig, write_phantoms
from fedseg.site.approval import approve
from tests.coordinator.studies import EXPERIMENT, Studies


class ReadySite:
    """The site Aare of a study of two, on disk.

    Args:
        folder: for the study.
        port: of the coordinator.
        experiment: TOML of the study.
        days: from now on which it was provisioned.
        data: write phantoms.
        study: other settings of the study file, as TOML.
    """

    def __init__(self, folder, *, port=8443, experiment=EXPERIMENT, days=0, data=True, **study):
        folder.mkdir(parents=True, exist_ok=True)
        self.study = Studies(folder)
        (folder / "experiment.toml").write_text(experiment)
        self.study.write("Aare", "Elbe", port=port, **study)
        self.study.provision(days=days)
        self.kit, self.file = self.study.site("Aare"), self.study.site("Aare") / "site.toml"
        self.data = folder / "data"
        self.write()
        approve(self.kit, (self.kit / "app.fab").read_bytes(), "app.fab", "somebody")
        if data:
            write_phantoms(self.data, PhantomConfig(cases=9, shape=(16, 16, 16), structures=("liver",)))

    def write(self, policy="min_cases = 3\nmin_validation_cases = 2", **settings):
        """Write the site file."""
        lines = {
            "name": "Aare",
            "data": str(self.data),
            "cache": "cache",
            "state": "state",
            "socket": "s.sock",
        } | settings
        text = "".join(f"{key} = {value if isinstance(value, int) else repr(value)}\n" for key, value in lines.items())
        self.file.write_text(f"{text}[policy]\n{policy}\n")
