//! The translator's accelerator against the suite.

use accel::Tier;
use accel_conformance::{Target, for_each_case};
use accel_dbt::DbtAccelerator;

macro_rules! interpreter {
    ($($module:ident::$name:ident),* $(,)?) => {
        mod interpreter {
            $(#[test]
            fn $name() {
                super::run(stringify!($name), super::Tier::Interpreter);
            })*
        }
    };
}

for_each_case!(interpreter);

macro_rules! translator {
    ($($module:ident::$name:ident),* $(,)?) => {
        mod translator {
            $(#[test]
            fn $name() {
                super::run(stringify!($name), super::Tier::Translator);
            })*
        }
    };
}

for_each_case!(translator);

fn run(name: &str, tier: Tier) {
    accel_conformance::run(name, &Target { accelerator: &DbtAccelerator, tier });
}
