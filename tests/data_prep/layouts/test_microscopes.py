"""File names and metadata of each microscope."""

from __future__ import annotations

import pytest

from data_prep.layouts import recognize
from perturbjax.core.errors import InputError

GUID = "836B5662-3526-47FE-A453-0D1775E08D17"
#: Case -> names of images, and the expected (plate, well, site, channel, z, time) of the last one.
NAMES = {
    "phenix": (
        ["BR00116991__2020-11-05T19_51_35-Measurement1/Images/r01c02f03p04-ch5sk1fk1fl1.tiff"],
        ("BR00116991", "A02", "3", "5", "4", "1"),
    ),
    "phenix_harmony_7": (["P1/Images/r16c24f01p01-ch1.tiff"], ("P1", "P24", "1", "1", "1", "1")),
    "imagexpress": (
        [f"ACHN-20X-P009041_B02_s1_w1{GUID}.tif", f"ACHN-20X-P009041_B02_s1_w1_thumb{GUID}.tif"],
        ("ACHN-20X-P009041", "B02", "1", "1", "1", "1"),
    ),
    "imagexpress_folders": (
        ["Plate1/TimePoint_1/ZStep_2/Plate1_A05_s4_w2.TIF"],
        ("Plate1", "A05", "4", "2", "2", "1"),
    ),
    "imagexpress_one_site": (["TE12345_A05_w3.tif"], ("TE12345", "A05", "1", "3", "1", "1")),
    "imagexpress_one_channel": (["TE12345_A05_s3.tif"], ("TE12345", "A05", "3", "1", "1", "1")),
    "imagexpress_hcs_ai": (
        ["experiment/timepoint0/assay_t0_C05_s0_w1_z0.tif"],
        ("assay", "C05", "0", "1", "0", "0"),
    ),
    "cv8000": (
        ["AssayPlate_Greiner_#655090_B02_T0001F004L01A01Z02C03.tif"],
        ("AssayPlate_Greiner_#655090", "B02", "4", "3", "2", "0001"),
    ),
    "scanr": (
        ["screen/data/A1--W00001--P00002--Z00000--T00000--Alexa 488.tif"],
        ("screen", "A01", "2", "Alexa 488", "0", "00000"),
    ),
    "incucyte": (
        ["green/VID1630_C4_2_01d23h34m.tif"],
        ("VID1630", "C04", "2", "Green", "1", "01d23h34m"),
    ),
    "incucyte_date": (
        ["Phase_B12_1_2019y04m22d_12h00m.tif"],
        ("images", "B12", "1", "Phase", "1", "2019y04m22d_12h00m"),
    ),
    "incucyte_archive": (
        ["EssenFiles/ScanData/2401/15/1430/0700/B12-1-Ph.tif"],
        ("0700", "B12", "1", "Ph", "1", "2401-15-1430"),
    ),
    "cellomics": (
        ["AS_09047_050428030001_O01f00d2.TIF"],
        ("AS_09047_050428030001", "O01", "0", "2", "1", "1"),
    ),
    "cellomics_kinetic": (
        ["020506plateruni3t001A01f01d2.TIF"],
        ("020506platerun", "A01", "1", "2", "1", "001"),
    ),
    "incell": (
        ["P1/A - 1(fld 2 wv UV - DAPI z 3 time 2 - 2636ms).tif"],
        ("P1", "A01", "2", "UV - DAPI", "3", "2"),
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_file_names_give_plate_well_site_and_channel(folder, case):
    names, expected = NAMES[case]
    found = recognize(folder(names))
    assert case.startswith(found.name)
    (image,) = found.images
    fields = (image.plate, image.well, image.site, image.channel, image.z, image.time)
    assert fields == expected
    assert not found.unmatched


def phenix_index(*images: str, maps: str = "") -> str:
    return (
        '<?xml version="1.0" encoding="utf-8"?><EvaluationInputData Version="1" '
        'xmlns="http://www.perkinelmer.com/PEHH/HarmonyV5"><Plates><Plate><PlateID>P7</PlateID>'
        f'<Well id="0102"/></Plate></Plates>{maps}<Wells><Well><Image id="0102K1"/></Well></Wells>'
        f"<Images>{''.join(images)}</Images></EvaluationInputData>"
    )


def phenix_image(name: str, channel: int, channel_name: str = "") -> str:
    title = f"<ChannelName>{channel_name}</ChannelName>" if channel_name else ""
    return (
        f"<Image><URL>{name}</URL><Row>1</Row><Col>2</Col><FieldID>3</FieldID><PlaneID>1</PlaneID>"
        f"<TimepointID>0</TimepointID><ChannelID>{channel}</ChannelID>{title}</Image>"
    )


def test_phenix_index_names_plate_channels_and_absent_images(folder):
    names = [f"r01c02f03p01-ch{channel}sk1fk1fl1.tiff" for channel in (1, 2, 3)]
    index = phenix_index(
        phenix_image(names[0], 1, "HOECHST 33342"),
        phenix_image(names[1], 2),
        phenix_image(names[2], 3, "Alexa 488"),
        maps="<Map><Entry ChannelID='2'><ChannelName>A &amp; B</ChannelName></Entry></Map>",
    )
    root = folder([f"x/Images/{name}" for name in names[:2]], {"x/Images/Index.idx.xml": index})
    found = recognize(root)
    assert [(i.plate, i.well, i.site, i.channel_name) for i in found.images] == [
        ("P7", "A02", "3", "HOECHST 33342"),
        ("P7", "A02", "3", "A & B"),
    ]
    assert found.absent == [f"x/Images/{names[2]}"]


def test_imagexpress_reads_wave_names(folder):
    htd = '"HTSInfoFile", Version 1.0\n"NWavelengths", 2\n"WaveName1", "DAPI"\n"WaveName2", "Cy5"\n'
    root = folder([f"p/TimePoint_1/p_A01_s1_w{n}.tif" for n in (1, 2)], {"p/p.HTD": htd})
    assert [image.channel_name for image in recognize(root).images] == ["DAPI", "Cy5"]


def yokogawa_record(kind: str, text: str, channel: int) -> str:
    return (
        f'<bts:MeasurementRecord bts:Type="{kind}" bts:Column="3" bts:Row="2" bts:TimePoint="1" '
        f'bts:FieldIndex="4" bts:ZIndex="1" bts:Ch="{channel}">{text}</bts:MeasurementRecord>'
    )


def test_cv8000_reads_records_plate_and_targets(folder):
    space = 'xmlns:bts="http://www.yokogawa.co.jp/BTS/BTSSchema/1.0"'
    names = [f"Greiner_B03_T0001F004L01A01Z01C0{n}.tif" for n in (1, 2)]
    records = [yokogawa_record("IMG", name, n) for n, name in enumerate(names, 1)]
    records.append(yokogawa_record("ERR", "AF Error at C14", 1))
    metadata = {
        "MeasurementData.mlf": f"<bts:Data {space}>{''.join(records)}</bts:Data>",
        "MeasurementDetail.mrf": f"<bts:MeasurementDetail {space}><bts:MeasurementSamplePlate "
        'bts:Name="PL1"/></bts:MeasurementDetail>',
        "Setting.mes": f'<bts:MeasurementSetting {space}><bts:ChannelList><bts:Channel bts:Ch="1" '
        'bts:Target="DNA"/></bts:ChannelList></bts:MeasurementSetting>',
    }
    found = recognize(folder(names[:1], metadata))
    (image,) = found.images
    assert (image.plate, image.well, image.site, image.channel_name) == ("PL1", "B03", "4", "DNA")
    assert found.absent == names[1:]
    assert found.notes == ["the microscope reported 1 errors, for example 'AF Error at C14'"]


def test_scanr_numbers_need_the_columns_of_the_plate(folder):
    names = ["s/data/--W00014--P00001--Z00000--T00000--dapi.tif"]
    with pytest.raises(InputError, match=r"number of a well.* experiment_descriptor\.xml"):
        recognize(folder(names))
    descriptor = (
        "<Cluster><Name>plate</Name><String><Name>plate name</Name><Val>MyPlate</Val></String>"
        "<Cluster><Name>format typedef</Name><U8><Name>Rows</Name><Val>8</Val></U8>"
        "<U8><Name>Columns</Name><Val>12</Val></U8></Cluster></Cluster>"
    )
    (image,) = recognize(folder(names, {"s/experiment_descriptor.xml": descriptor})).images
    assert (image.plate, image.well, image.channel_name) == ("MyPlate", "B02", "dapi")
    with pytest.raises(InputError, match="well 501 is not on a plate with 12 columns"):
        recognize(folder(["s/data/--W00501--P00001--Z00000--T00000--dapi.tif"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", "has a document type"),
        ("<a><b></a>", "is not valid XML"),
        ("", "is not valid XML"),
        ("<a>" * 101 + "</a>" * 101, "nested more than 100 times"),
        (phenix_index("<Image><URL>a.tiff</URL><Row>x</Row></Image>"), "no valid Row"),
        (phenix_index(phenix_image("a.tiff", 1).replace("<Row>1", "<Row>0")), "row 0, column 2"),
        (phenix_index(phenix_image("a.tiff", 1).replace("<PlaneID>1", "<PlaneID>x")), "'x'"),
    ],
)
def test_damaged_or_hostile_xml_is_refused(folder, content, message):
    root = folder(["r01c02f03p01-ch1sk1fk1fl1.tiff"], {"Index.idx.xml": content})
    with pytest.raises(InputError, match=message):
        recognize(root)


def test_metadata_of_another_layout_do_not_decide(folder):
    found = recognize(folder(["P_A01_s1_w1.tif"], {"Index.xml": "<a/>"}))
    assert found.name == "imagexpress"


def test_layout_can_be_chosen(folder):
    names = ["P_A01_s1_w1.tif", "P_A02_s1_w1.tif", "P_A01f00d2.TIF"]
    assert len(recognize(folder(names)).images) == 2
    found = recognize(folder(names), "cellomics")
    assert [image.path for image in found.images] == names[2:]
    assert found.unmatched == names[:2]
