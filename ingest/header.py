"""Reading DICOM headers: what planning needs of every slice, the frames of a multi-frame object among them.

A frame of an Enhanced CT (PS3.3 A.38, C.7.6.16) is a slice like any other, once the attributes of its functional
groups stand where a single-frame object has them: one set of rules decides on both.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from pydicom.dataset import Dataset, FileDataset
from pydicom.tag import Tag
from pydicom.uid import UID

from maesil.errors import Refused
from maesil.ingest.cone_beam import is_cone_beam
from maesil.ingest.source_file import MAX_HEADER_BYTES, read_dataset
from maesil.ingest.source_path import SourcePath
from maesil.ingest.technical import NAMING_TAGS, TECHNICAL_TAGS, technical_of
from maesil.ingest.values import numbers_in, tags_of, texts_of, whole_number
from maesil.store.records import Technical

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Shared = TypeVar("Shared")

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
MAX_FRAMES = 65536

_IDENTITY_TAGS = (
    "SOPInstanceUID",
    "SOPClassUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "PatientID",
    "IssuerOfPatientID",
)
_PATIENT_TAGS = ("IssuerOfPatientID", "PatientID")
GEOMETRY_TAGS = (
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
)
_ACQUISITION_TAGS = (
    "AcquisitionNumber",
    "KVP",
    "ConvolutionKernel",
    "TemporalPositionIndex",
    "NominalPercentageOfCardiacPhase",
    "TemporalPositionIdentifier",
    "ImageType",
    "SeriesNumber",
    "NominalPercentageOfRespiratoryPhase",
    "CardiacCyclePosition",
    "RespiratoryCyclePosition",
)
_WEAK_TAGS = (
    "MonoenergeticEnergyEquivalent",
    "StackID",
    "AcquisitionUID",
    "SeriesDescription",
    "ContrastBolusAgent",
    "AcquisitionDateTime",
    "AcquisitionTime",
    "FrameAcquisitionDateTime",
    "TriggerTime",
    "NominalCardiacTriggerDelayTime",
    "NominalRespiratoryTriggerDelayTime",
    "ContentTime",
    "ImageComments",
)
_MOST_DIMENSIONS = 6
_BODY_PART_TAGS = ("BodyPartExamined", "ProtocolName", "StudyDescription")
_HEAD_WORDS = ("HEAD", "BRAIN", "SKULL", "FACE", "FACIAL", "SINUS", "ORBIT", "CRANI", "NEURO", "WHOLEBODY")
_ANIMAL_TAGS = ("PatientSpeciesDescription", "PatientBreedDescription")
_PEOPLE = ("HUMAN", "HOMO SAPIENS", "HOMO")
_OTHER_TAGS = (
    "Modality", "DimensionIndexValues", "BurnedInAnnotation", "FrameOfReferenceUID", "SliceLocation", "RescaleType",
    "SamplesPerPixel", "AnatomicalOrientationType", *_ANIMAL_TAGS, *_BODY_PART_TAGS,
)  # fmt: skip
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_PLAIN_TAGS = (
    *_IDENTITY_TAGS, *GEOMETRY_TAGS, *_ACQUISITION_TAGS, *_WEAK_TAGS, *_OTHER_TAGS, *TECHNICAL_TAGS,
    *NAMING_TAGS,
)  # fmt: skip
_WANTED = frozenset(int(Tag(name)) for name in (*_PLAIN_TAGS, *_GROUPS))
_HEADER_TAGS = tags_of(*_PLAIN_TAGS)
_CLASS_TAGS = tags_of("SOPClassUID", "Modality", "ImagePositionPatient")
_META_TAGS = tags_of("MediaStorageSOPClassUID", "MediaStorageSOPInstanceUID", "TransferSyntaxUID")
_FRAME_NAMES = {"FrameType": "ImageType", "FrameAcquisitionNumber": "AcquisitionNumber"}


@dataclass(frozen=True, slots=True)
class InstanceHeader:
    """What planning needs of one slice. Lengths in mm, LPS."""

    path: SourcePath
    sop_class: str
    patient: str
    study: str
    series: str
    modality: str
    image_type: tuple[str, ...]
    rows: int
    columns: int
    frames: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    acquisition: tuple[str, ...]
    """What tells two passes over the same positions apart: acquisition number, kernel, tube voltage, phase..."""
    transfer_syntax: str
    technical: Technical
    weak: tuple[str, ...] = ()
    """Tells passes apart where nothing better does: energy level, contrast, times, the object it is a frame of..."""
    frame: int | None = None
    """Index within a multi-frame object."""
    frame_of_reference: str = ""
    """UID: positions of two frames of reference cannot be compared (PS3.3 C.7.4.1.1.1)."""
    slice_location: str = ""
    """As a text; never decides where a slice lies."""
    rescale_type: str = ""
    """Unit of the rescaled values, upper case."""
    samples: int = 1
    """Values a pixel: 3 is a picture in colour."""
    remarks: tuple[str, ...] = ()
    """Notes that the header alone gives rise to: burned-in text, a face, an animal, a cone beam."""

    def said(self, name: str) -> str:
        """Return what the header says of one of the attributes that tell passes apart; empty if nothing."""
        found = dict(zip((*_ACQUISITION_TAGS, *_WEAK_TAGS), (*self.acquisition, *self.weak), strict=False))
        return found.get(name, "")


def without_warnings(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Silence pydicom, which warns of each odd value when it is read; what matters is checked here."""

    @functools.wraps(function)
    def quiet(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)

    return quiet


@without_warnings
def read_headers(path: SourcePath) -> list[InstanceHeader]:
    """Read the header of each slice of a file; `Refused` with code ``not_ct...`` for other objects, or what is broken.

    One header for a single-frame object, one a frame for a multi-frame object.
    """
    dataset = read_dataset(path, tags=_WANTED, max_bytes=MAX_HEADER_BYTES)
    try:
        sop_class = _sop_class(dataset)
        if sop_class in ENHANCED_CT:
            return [_header(path, dataset, frame, sop_class, n) for n, frame in enumerate(frame_datasets(dataset))]
        return [_header(path, dataset, dataset, sop_class, None)]
    except Refused:
        raise
    except Exception as error:  # values are parsed when they are asked for, and pydicom raises anything then
        raise Refused("bad_header", f"a value of the header cannot be read ({type(error).__name__})") from error


def frame_datasets(dataset: Dataset) -> Iterator[Dataset]:
    """Yield, for each frame, the attributes a single-frame object would have; `Refused` if frames are not described."""
    shared = _flat(dataset.get(_GROUPS[0]) or [Dataset()])
    per_frame = dataset.get(_GROUPS[1]) or []
    count = int(dataset.get("NumberOfFrames") or 0)
    if not 0 < count <= MAX_FRAMES:
        raise Refused("size_limit", f"expected 1 to {MAX_FRAMES} frames, found {count}")
    if len(per_frame) != count:
        raise Refused("bad_enhanced", f"expected functional groups of {count} frames, found {len(per_frame)}")
    top = Dataset()
    top.update({element.tag: element for element in dataset if element.keyword not in (*_GROUPS, "PixelData")})
    for item in per_frame:
        frame = Dataset()
        for part in (top, shared, _flat([item])):
            frame.update(part)
        yield frame


def _flat(groups: Any) -> Dataset:
    """Return the attributes of all macros of a functional group in one data set, under their single-frame names."""
    flat = Dataset()
    for macro in groups[0]:
        if macro.VR == "SQ" and len(macro.value) == 1:
            flat.update(macro.value[0])
    for name, plain in _FRAME_NAMES.items():
        if name in flat:
            setattr(flat, plain, flat[name].value)
    return flat


def _sop_class(dataset: FileDataset) -> str:
    texts, meta = texts_of(dataset, _CLASS_TAGS), texts_of(dataset.file_meta, _META_TAGS)
    sop_class = texts["SOPClassUID"] or meta["MediaStorageSOPClassUID"]
    if not sop_class and texts["Modality"] == "CT" and texts["ImagePositionPatient"]:
        return CT_IMAGE  # blanked by an anonymiser; all that a CT image needs is there
    if not sop_class and not texts["Modality"] and dataset.preamble:
        raise Refused("bad_header", "expected a SOP class, found none: the header was cut")
    if sop_class not in (CT_IMAGE, *ENHANCED_CT):
        name = UID(sop_class).name if sop_class else "no SOP class"
        raise Refused("not_ct_image", f"expected CT Image Storage, found {name}")
    if (modality := texts["Modality"] or "CT") != "CT":
        raise Refused("not_ct_modality", f"expected modality CT, found {modality}")
    return sop_class


def _header(
    path: SourcePath, dataset: FileDataset, frame: Dataset, sop_class: str, number: int | None
) -> InstanceHeader:
    meta = texts_of(dataset.file_meta, _META_TAGS)
    texts = texts_of(frame, _HEADER_TAGS)
    instance = texts["SOPInstanceUID"] or meta["MediaStorageSOPInstanceUID"]
    series = texts["SeriesInstanceUID"]
    if not (texts["Rows"] and texts["Columns"]):
        raise Refused("bad_header", "expected Rows and Columns, found none: the header was cut")
    return InstanceHeader(
        path=path,
        sop_class=_one(sop_class),
        patient=_one("|".join(filter(None, (texts[tag] for tag in _PATIENT_TAGS)))),
        study=_one(texts["StudyInstanceUID"]),
        series=_one(series),
        modality="CT",
        image_type=_one(tuple(value.strip() for value in texts["ImageType"].upper().split("\\"))),
        rows=whole_number(texts["Rows"], "Rows") or 0,
        columns=whole_number(texts["Columns"], "Columns") or 0,
        frames=whole_number(texts["NumberOfFrames"], "NumberOfFrames") or 1,
        position=numbers_in(texts["ImagePositionPatient"], 3),
        orientation=_one(numbers_in(texts["ImageOrientationPatient"], 6)),
        pixel_spacing=_one(numbers_in(texts["PixelSpacing"], 2)),
        acquisition=_one(tuple(texts[tag] for tag in _ACQUISITION_TAGS)),
        transfer_syntax=_one(meta["TransferSyntaxUID"]),
        technical=_technical(texts),
        weak=_one(_weak(texts, "" if number is None else instance)),
        frame=number,
        frame_of_reference=_one(texts["FrameOfReferenceUID"]),
        slice_location=texts["SliceLocation"],
        rescale_type=_one(texts["RescaleType"].upper()),
        samples=whole_number(texts["SamplesPerPixel"], "SamplesPerPixel") or 1,
        remarks=_one(_remarks(texts)),
    )


def _remarks(texts: Mapping[str, str]) -> tuple[str, ...]:
    body_part = " ".join(texts[tag] for tag in _BODY_PART_TAGS).upper()
    species = texts["PatientSpeciesDescription"].upper()
    found = ["burned_in_annotation"] if texts["BurnedInAnnotation"].upper() == "YES" else []
    found += ["head"] if any(word in body_part for word in _HEAD_WORDS) else []
    if texts["AnatomicalOrientationType"].upper() == "QUADRUPED":
        found.append("quadruped")
    elif (species and not species.startswith(_PEOPLE)) or (texts["PatientBreedDescription"] and not species):
        found.append("animal")
    if is_cone_beam(texts):
        found.append("cone_beam")
    return tuple(found)


def _weak(texts: Mapping[str, str], multi_frame_object: str) -> tuple[str, ...]:
    """Return what tells passes apart at last; a frame's index along each dimension (PS3.3 C.7.6.17) is among it."""
    indices = texts["DimensionIndexValues"].split("\\")[:_MOST_DIMENSIONS]
    indices += [""] * (_MOST_DIMENSIONS - len(indices))
    return (*(texts[tag] for tag in _WEAK_TAGS), *indices, multi_frame_object)


_ones: dict[Any, Any] = {}
_MOST_ONES = 1 << 16
"""Times and UIDs are new in each slice or series: what was met long ago is let go of."""


def _one(value: Shared) -> Shared:
    """Return the one object of this value: millions of slices say the same few things."""
    if len(_ones) > _MOST_ONES:
        _ones.clear()
    return _ones.setdefault(value, value)  # type: ignore[no-any-return]


def _technical(texts: Mapping[str, str]) -> Technical:
    key = ("technical", *(texts[tag] for tag in (*TECHNICAL_TAGS, *NAMING_TAGS)))
    if key not in _ones:
        _ones[key] = technical_of(texts)
    return _ones[key]  # type: ignore[no-any-return]
