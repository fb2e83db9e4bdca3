"""Why a case is not used: short codes that may leave a hospital, each with one line of explanation."""

from enum import StrEnum


class Reason(StrEnum):
    """Code of a defect that keeps a case out of training; it names no file and no person."""

    MISSING_IMAGE = "missing-image"
    MISSING_LABEL = "missing-label"
    UNREADABLE = "unreadable"
    WRONG_CHANNELS = "wrong-channels"
    SHAPE_MISMATCH = "shape-mismatch"
    AFFINE_MISMATCH = "affine-mismatch"
    ABSURD_SPACING = "absurd-spacing"
    NON_FINITE = "non-finite"
    CONSTANT_IMAGE = "constant-image"
    UNKNOWN_LABEL = "unknown-label"
    EMPTY_LABEL = "empty-label"

    @property
    def explanation(self) -> str:
        """One line for people."""
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    Reason.MISSING_IMAGE: "an image file of the case is listed or expected, but is not there",
    Reason.MISSING_LABEL: "the case has no label file",
    Reason.UNREADABLE: "a file is damaged, cut short, protected or no NIfTI at all",
    Reason.WRONG_CHANNELS: "the image has another number of channels than the task",
    Reason.SHAPE_MISMATCH: "image channels, or image and label, differ in size, or a file is not 3D",
    Reason.AFFINE_MISMATCH: "image channels, or image and label, lie at different places in the scanner's frame",
    Reason.ABSURD_SPACING: "the affine is singular or the voxel spacing is outside 0.01 to 50 mm, or the study's too fine",
    Reason.NON_FINITE: "the file holds NaN or infinite values",
    Reason.CONSTANT_IMAGE: "a channel has the same value everywhere",
    Reason.UNKNOWN_LABEL: "the label holds a value that the task does not name, or one that is no whole number",
    Reason.EMPTY_LABEL: "the label is background only",
}
