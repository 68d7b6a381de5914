"""Synthetic CT: the phantom, its DICOM files, the demo."""
