"""The three cameras momo is made for.

Ground sample distances are those of the published corpus (HiRISE 0.25 m, CTX 5 m, THEMIS infrared 100 m a pixel);
a product's own GSD, read from its georeference, always takes precedence.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import one_of


@dataclass(frozen=True)
class Sensor:
    """One camera.

    Attributes:
        name: Field name of the camera.
        gsd_m: Nominal ground sample distance in metres a pixel.
        instrument_ids: Spellings found in PDS and ISIS labels, upper case.
        description: One line for reports.
    """

    name: str
    gsd_m: float
    instrument_ids: tuple[str, ...]
    description: str


SENSORS: dict[str, Sensor] = {
    sensor.name: sensor
    for sensor in (
        Sensor("HiRISE", 0.25, ("HIRISE",), "visible, push-broom, Mars Reconnaissance Orbiter"),
        Sensor("CTX", 5.0, ("CTX",), "visible context camera, Mars Reconnaissance Orbiter"),
        Sensor("THEMIS", 100.0, ("THEMIS", "THEMIS_IR", "THEMIS_VIS"), "thermal infrared, Mars Odyssey"),
    )
}


def sensor_named(name: str) -> Sensor:
    """Returns the sensor of that name, in any letter case.

    Raises:
        ConfigError: No sensor has the name.
    """
    by_lower = {known.lower(): sensor for known, sensor in SENSORS.items()}
    if name.lower() not in by_lower:
        one_of("sensor", name, list(SENSORS))
    return by_lower[name.lower()]


def sensor_from_instrument(instrument: str) -> Sensor | None:
    """Returns the sensor an instrument id of a label means, or None for other cameras."""
    wanted = instrument.strip().strip('"').upper()
    for sensor in SENSORS.values():
        if wanted in sensor.instrument_ids:
            return sensor
    return None


# Okabe-Ito palette: told apart with any colour vision (Okabe and Ito 2008).
_COLOURS = {"HiRISE": "#D55E00", "CTX": "#0072B2", "THEMIS": "#009E73"}


def sensor_colour(name: str) -> str:
    """Returns the colour a sensor has in every figure; grey for an unknown one."""
    return _COLOURS.get(name, "#666666")
