use super::*;
use crate::report::scene::Shape;
use crate::report::{
    Axis, Bar, BarSeries, ColourScale, Front, HeatAxis, LineStyle, Reference, ScatterGroup, Series,
};

fn lengths() -> Vec<f64> {
    (7..=14).map(|k| f64::from(k).exp2()).collect()
}

fn cost_chart(title: &str, names: &[&str]) -> LineChart {
    let one = |(i, name): (usize, &&str)| {
        let slope = 1.0 + 0.25 * i as f64;
        let points = lengths().into_iter().map(move |l| {
            let y = 1e-7 * l.powf(slope);
            (l, y, 0.6 * y, 1.7 * y)
        });
        Series::new(*name, points)
    };
    let quadratic = Series::prediction("slope 2", lengths().into_iter().map(|l| (l, 2e-8 * l * l)));
    LineChart {
        title: title.into(),
        x: Axis::log2("sequence length L (tokens)"),
        y: Axis::log10("time of one gradient (s)"),
        series: names.iter().enumerate().map(one).chain([quadratic]).collect(),
        references: vec![
            Reference::Vertical(1024.0, "Γ = √log L".into()),
            Reference::Horizontal(1e-3, "one frame at 1 kHz".into()),
        ],
    }
}

fn scatter() -> ScatterChart {
    let group = |name: &str, shift: f64| ScatterGroup {
        name: name.into(),
        points: (1..12)
            .map(|i| (10f64.powf(5.0 + 0.3 * f64::from(i)), 10f64.powf(shift - 0.7 * f64::from(i))))
            .collect(),
    };
    ScatterChart {
        title: "Error against cost".into(),
        x: Axis::log10("cost (floating-point operations)"),
        y: Axis::log10("relative error of the gradient"),
        groups: vec![
            group("taylor", 0.0),
            group("chebyshev", -1.0),
            group("nystrom", 1.0),
            group("positive-features", 1.6),
        ],
        front: Some(Front::MinimiseBoth),
        references: vec![],
    }
}

fn heat(colours: ColourScale) -> HeatMap {
    let centres: Vec<f64> = (0..9).map(|i| 0.25 + 0.25 * f64::from(i)).collect();
    let values = (0..8)
        .map(|r| {
            (0..9)
                .map(|c| {
                    if r == 2 && c == 3 {
                        f64::NAN
                    } else {
                        (f64::from(c) - 3.0) * 10f64.powi(r - 5)
                    }
                })
                .collect()
        })
        .collect();
    let mut map = HeatMap::new(
        "Exponent over norm and length",
        HeatAxis::numbers(Axis::linear("norm ratio c = Γ / √log L"), centres),
        HeatAxis::numbers(Axis::log2("sequence length L (tokens)"), lengths()),
        values,
        "relative error of the gradient",
    );
    map.colours = colours;
    map.curves = vec![Series::prediction(
        "predicted boundary",
        [(0.3, 128.0), (1.0, 1024.0), (2.1, 9000.0)],
    )];
    map
}

fn categorical_heat() -> HeatMap {
    let mut map = HeatMap::new(
        "Decision accuracy",
        HeatAxis::categories(
            "method",
            ["dense", "streaming", "taylor degree 4", "nystrom", "tensor-sketch"],
        ),
        HeatAxis::categories("head", ["layer 0, head 7", "layer 3, head 10", "synthetic"]),
        vec![vec![1.0, 0.99, 0.5, 0.75, 0.1], vec![0.2, 0.4, f64::NAN, 0.83, 1.0], vec![0.0, 0.31]],
        "share of instances decided",
    );
    map.annotate = true;
    map
}

fn bars(stacked: bool) -> BarChart {
    let series = |name: &str, scale: f64| {
        BarSeries::new(
            name,
            (1..=4).map(|i| {
                let v = scale * f64::from(i);
                (v, 0.9 * v, 1.15 * v)
            }),
        )
    };
    BarChart {
        title: "Peak memory of one training step".into(),
        group_label: "adaptation method".into(),
        groups: ["full", "LoRA r = 8", "PaCA r = 8", "S2FT"].map(String::from).to_vec(),
        y: Axis::linear("memory (MiB)"),
        series: vec![
            series("weights", 40.0),
            series("activations", 61.5),
            series("optimizer", 25.0),
        ],
        stacked,
        values: true,
    }
}

/// Figures as experiments draw them.
fn gallery() -> Vec<NamedFigure> {
    let names = ["dense", "streaming", "chained, taylor", "chained, nystrom"];
    let caption = "Shaded: 95 % Student t interval over 5 seeds. Lines without markers are \
                   predictions; the dashed verticals mark where the norm bound of the theorem is \
                   met with equality.";
    let mut single =
        Figure::new("Cost of one LoRA gradient against sequence length", [cost_chart("", &names)])
            .caption(caption);
    single.legend = LegendPlace::Auto;
    let mut many = Figure::new(
        "A long figure title that says what is compared, over which range, and at which accuracy, \
         on two lines at least",
        ["c = 0.5", "c = 1", "c = 2", "c = 4", "c = 8"].map(|t| cost_chart(t, &names[..3])),
    );
    (many.share_x, many.share_y, many.palette) = (true, true, Palette::Ordered);
    let mut crowded = Figure::new("Crowded", [cost_chart("every corner taken", &names)]);
    if let Panel::Lines(chart) = &mut crowded.panels[0] {
        let zigzag =
            (0..60).map(|i| (128.0 * 1.08f64.powi(i), if i % 2 == 0 { 1e-6 } else { 10.0 }));
        chart.series.push(Series { line: LineStyle::Dotted, ..Series::new("zigzag", zigzag) });
    }
    let mixed: Vec<Panel> = vec![
        scatter().into(),
        heat(ColourScale::Log10).into(),
        bars(false).into(),
        categorical_heat().into(),
    ];
    let mut separate = Figure::new("Panels with their own legends", mixed.clone());
    separate.legend = LegendPlace::Panels;
    vec![
        NamedFigure::new("lines", single),
        NamedFigure::new("panels", many),
        NamedFigure::new("crowded", crowded),
        NamedFigure::new("scatter", Figure::new("Best trade-offs", [scatter()])),
        NamedFigure::new("heat", Figure::new("Phase diagram", [heat(ColourScale::Log10)])),
        NamedFigure::new("diverging", Figure::new("", [heat(ColourScale::Diverging)])),
        NamedFigure::new("categories", Figure::new("", [categorical_heat()])),
        NamedFigure::new("bars", Figure::new("Memory", [bars(false), bars(true)])),
        NamedFigure::new("mixed", Figure::new("Four kinds", mixed)),
        NamedFigure::new("separate", separate),
    ]
}

/// Figures of data that went wrong.
fn hostile() -> Vec<NamedFigure> {
    let inf = f64::INFINITY;
    let bad: Vec<(f64, f64)> = vec![
        (1.0, f64::NAN),
        (f64::NAN, 1.0),
        (2.0, inf),
        (4.0, -inf),
        (8.0, 0.0),
        (16.0, -1.0),
        (-1.0, 1.0),
        (inf, 1.0),
        (0.0, 1.0),
    ];
    let good = |p: &[(f64, f64)]| p.to_vec();
    let banded = vec![
        (1.0, 1.0, f64::NAN, 2.0),
        (2.0, 2.0, -inf, inf),
        (3.0, inf, 0.0, inf),
        (4.0, 1.0, 0.0, 2.0),
    ];
    let kinds: Vec<(&str, Vec<(f64, f64)>)> = vec![
        ("empty", vec![]),
        ("bad", bad.clone()),
        ("single", good(&[(3.0, 2.0)])),
        ("equal", good(&[(3.0, 2.0), (3.0, 2.0)])),
        ("huge", good(&[(1e300, 1e-300), (1e-300, 1e300)])),
        ("part-bad", bad.into_iter().chain([(3.0, 5.0), (5.0, 3.0)]).collect()),
    ];
    let mut figures = Vec::new();
    for (name, points) in kinds {
        let mut panels: Vec<Panel> = Vec::new();
        for axis in [Axis::linear, Axis::log10, Axis::log2] as [fn(&'static str) -> Axis; 3] {
            let series =
                vec![Series::new("points", points.clone()), Series::new("banded", banded.clone())];
            let references = vec![
                Reference::Vertical(f64::NAN, "nowhere".into()),
                Reference::Horizontal(inf, "far".into()),
            ];
            let chart = LineChart {
                x: axis("x (m)"),
                y: axis("y (s)"),
                series,
                references,
                ..Default::default()
            };
            panels.push(chart.into());
            panels.push(Panel::Scatter(ScatterChart {
                x: axis("x (m)"),
                y: axis("y (s)").range(5.0, -5.0),
                groups: vec![ScatterGroup { name: "points".into(), points: points.clone() }],
                front: Some(Front::MinimiseXMaximiseY),
                ..Default::default()
            }));
            let ys = points.iter().map(|p| p.1);
            panels.push(Panel::Bars(BarChart {
                groups: points.iter().map(|p| format!("{}", p.0)).collect(),
                y: axis("y (s)"),
                series: vec![
                    BarSeries::new("plain", ys.clone()),
                    BarSeries::new(
                        "wide",
                        ys.map(|y| Bar { value: y, interval: Some((-inf, f64::NAN)) }),
                    ),
                    BarSeries::new::<f64>("none", []),
                ],
                stacked: panels.len() > 4,
                values: true,
                ..Default::default()
            }));
            let values: Vec<Vec<f64>> = points.iter().map(|p| vec![p.0, p.1]).collect();
            let rows: Vec<f64> = points.iter().map(|p| p.1).collect();
            panels.push(
                HeatMap::new(
                    "",
                    HeatAxis::categories("c", ["a", "b", "c"]),
                    HeatAxis::numbers(axis("r"), rows),
                    values,
                    "v",
                )
                .into(),
            );
        }
        figures.push(NamedFigure::new(name, Figure::new(name, panels).columns(4)));
    }
    figures.push(NamedFigure::new("nothing", Figure::new::<Panel>("", [])));
    figures
}

/// Texts that leave the picture or touch each other.
fn collisions(scene: &Scene) -> Vec<String> {
    let texts: Vec<&Text> = scene
        .shapes
        .iter()
        .filter_map(|s| if let Shape::Text(t) = s { Some(t) } else { None })
        .collect();
    let page = Rect { x0: 0.0, y0: 0.0, x1: scene.width, y1: scene.height };
    let mut found = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        let bounds = text.bounds();
        if !page.holds((bounds.x0, bounds.y0)) || !page.holds((bounds.x1, bounds.y1)) {
            found.push(format!("{:?} leaves the page: {bounds:?}", text.text));
        }
        for other in &texts[..i] {
            if bounds.grown(-0.5).overlaps(&other.bounds()) {
                found.push(format!("{:?} touches {:?}", text.text, other.text));
            }
        }
    }
    found
}

#[test]
fn no_text_is_clipped_or_touches_another() {
    for NamedFigure { name, figure } in gallery() {
        let found = collisions(&figure.scene());
        assert!(found.is_empty(), "{name}: {found:#?}");
    }
}

#[test]
fn no_text_is_too_small() {
    for NamedFigure { name, figure } in gallery() {
        for shape in figure.scene().shapes {
            if let Shape::Text(text) = shape {
                assert!(text.size >= 14.0, "{name}: {text:?}");
            }
        }
    }
}

#[test]
fn every_coordinate_is_on_the_page_whatever_the_data() {
    for NamedFigure { name, figure } in hostile().into_iter().chain(gallery()) {
        let scene = figure.scene();
        let page = Rect { x0: -1.0, y0: -1.0, x1: scene.width + 1.0, y1: scene.height + 1.0 };
        for shape in &scene.shapes {
            let points = match shape {
                Shape::Line { points, .. } | Shape::Polygon { points, .. } => points.clone(),
                Shape::Circle { at, .. } => vec![*at],
                Shape::Text(text) => vec![text.at],
            };
            assert!(points.iter().all(|p| page.holds(*p)), "{name}: {shape:?}");
        }
    }
}

#[test]
fn every_figure_gives_valid_files_whatever_the_data() {
    let folder = tempfile::tempdir().unwrap();
    for NamedFigure { name, figure } in hostile().into_iter().chain(gallery()) {
        let [svg, png] = figure.write(folder.path(), &name).unwrap();
        let text = std::fs::read_to_string(svg).unwrap();
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"), "{name}");
        assert_eq!(text.matches("<text").count(), text.matches("</text>").count(), "{name}");
        assert!(!text.contains("NaN") || name == "bad" || name == "part-bad", "{name}");
        let scene = figure.scene();
        assert!(
            text.contains(&format!("width=\"{}\" height=\"{}\"", scene.width, scene.height)),
            "{name}"
        );
        let mut reader = png::Decoder::new(std::fs::File::open(png).unwrap()).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!(
            (f64::from(info.width), f64::from(info.height)),
            (2.0 * scene.width, 2.0 * scene.height)
        );
        assert_eq!(pixels.iter().any(|p| *p != 255), name != "nothing", "{name}");
    }
    // Only the finished files are there.
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        2 * (hostile().len() + gallery().len())
    );
}

#[test]
fn data_and_names_reach_the_svg() {
    let folder = tempfile::tempdir().unwrap();
    let figure = Figure::new("a < b & c", [cost_chart("", &["dense"])]);
    let [svg, _] = figure.write(folder.path(), "f").unwrap();
    let text = std::fs::read_to_string(svg).unwrap();
    for part in [
        "a &lt; b &amp; c",
        "dense",
        "slope 2",
        "tokens",
        "Γ = √log L",
        "10⁻³",
        "DejaVu Sans, sans-serif",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    // Eight markers and one in the legend.
    assert_eq!(text.matches("<circle").count(), 9);
}

#[test]
fn a_series_looks_the_same_in_every_panel() {
    let panels = [cost_chart("", &["a", "b"]), cost_chart("", &["b"])];
    let figure = Figure::new("", panels);
    let styles = figure.styles(&figure.plots());
    assert_eq!(styles.names, ["a", "b", "slope 2"]);
    let [first, second] = [0, 1].map(|i| figure.plots()[i].legend(&styles));
    assert_eq!(first[1..], second[..]);
    assert_ne!(first[0].colour, first[1].colour);
    assert_ne!(first[0].marker, first[1].marker);
}

#[test]
fn a_method_has_its_colour_in_every_figure() {
    let style = |names: &[&str], name: &str| {
        let figure = Figure::new("", [cost_chart("", names)]);
        figure.styles(&figure.plots()).of(name)
    };
    // Alone with other series or in another order: the same colour.
    for names in
        [&["lora", "paca", "full"][..], &["s2ft", "full", "paca"], &["other", "paca", "dora"]]
    {
        assert_eq!(style(names, "paca").0, crate::report::theme::CATEGORICAL[2]);
    }
    // A variant shares the colour and differs in its marker; nobody else takes a colour in use.
    let names = ["s2ft, random channels", "s2ft, large gradients", "lora", "qlora", "oracle"];
    let [a, b, lora, packed, other] = names.map(|name| style(&names, name));
    assert!(a.0 == b.0 && a.1 != b.1 && lora.0 == packed.0 && lora.1 != packed.1);
    assert!(other.0 != a.0 && other.0 != lora.0);
    // One name that happens to be a method's changes nothing.
    assert_eq!(style(&["tiles", "full"], "full").0, crate::report::theme::CATEGORICAL[1]);
}
